"""Options and run-time shape checks shared by all tests."""

import os
import re
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

# Eight devices for the multi-device tests. The rest halves what the tests spend on compiling: one compiler thread
# per worker (the workers fill the cores), and machine code without LLVM's optimisations. `.ci/run` repeats a
# part of the parity tests with optimised code, and `tests.parity.report` always uses it.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_backend_optimization_level=0",
)

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
DEFAULT_PARITY = ROOT.parent / "shared" / "parity"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--parity-dir",
        type=Path,
        default=None,
        help="folder of recorded cases to check (default: tests/fixtures and ../shared/parity)",
    )


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    """One worker runs all tests of a recorded case, so that what they compile is compiled once."""

    class ByCase(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            case = re.search(r"/parity/.*\[(\w+)", nodeid)
            return case[1] if case else nodeid

    return ByCase(config, log)


def parity_folders(config: pytest.Config) -> list[Path]:
    """The folders that hold recorded cases: the one named, else this project's and the shared one."""
    named = config.getoption("--parity-dir")
    if named is not None:
        if not named.is_dir():
            raise pytest.UsageError(f"--parity-dir {named} is not a folder")
        return [named.resolve()]
    return [folder for folder in (FIXTURES, DEFAULT_PARITY) if folder.is_dir()]
