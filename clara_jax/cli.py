"""`clara-jax COMMAND ...`: the same as `python -m clara_jax.COMMAND ...`."""

import runpy
import sys

COMMANDS = ("train", "convert", "compress", "ask", "evaluate", "inspect", "preflight", "benchmark")


def main() -> None:
    """Run the named command."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.stderr.write(f"usage: clara-jax {{{','.join(COMMANDS)}}} ...\n")
        sys.exit(2)
    sys.argv = [f"clara_jax.{sys.argv[1]}", *sys.argv[2:]]
    runpy.run_module(sys.argv[0], run_name="__main__")
