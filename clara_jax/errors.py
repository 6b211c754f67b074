"""The one exception for a mistake that the user can mend."""

import importlib
import sys
from collections.abc import Callable
from typing import Any, NoReturn


class UserError(Exception):
    """A wrong input: its text names the thing, where it stands and what to do.

    Commands print it on one line and exit with status 2 (see `run_command`).
    """


def fail(problem: str, fix: str) -> NoReturn:
    """Raise `UserError` with `problem` (the thing and where it stands) and `fix` (what to do)."""
    raise UserError(f"{problem}. {fix}.")


def require_package(name: str, use: str, pip: str) -> Any:
    """The package `name`, which not every installation has. `use` needs it, `pip install PIP` brings it.

    Raises `UserError` where it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:  # installed, and lacks something itself
            raise
        package = name.replace("_", "-")  # as pip writes it
        fail(f"{use} needs the package {package}, which is not installed", f"Run: pip install '{pip}'")


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a command's `main`; a `UserError` becomes one line on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(2)
    sys.exit(0)
