"""Commands of the project, each in a process of its own."""

import subprocess
import sys
from pathlib import Path

from clara_jax.errors import fail


def run_module(log: Path, module: str, *arguments: object) -> None:
    """`python -m module ARGUMENTS`, what it prints going to `log`. Raises `UserError` where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        command = [sys.executable, "-m", module, *map(str, arguments)]
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        fail(f"{module} ended with {code}, see {log}", "Correct what it says, and give the same command again")
