"""Options and run-time shape checks shared by all tests."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

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


def parity_folders(config: pytest.Config) -> list[Path]:
    """The folders that hold recorded cases: the one named, else this project's and the shared one."""
    named = config.getoption("--parity-dir")
    if named is not None:
        return [named.resolve()]
    return [folder for folder in (FIXTURES, DEFAULT_PARITY) if folder.is_dir()]
