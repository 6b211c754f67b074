"""Command lines whose options come from dataclasses (jsonargparse), with errors on one line, and what they say."""

import argparse
import sys
from collections.abc import Sequence

import jsonargparse

from clara_jax.errors import UserError, fail


def parse(
    parser: jsonargparse.ArgumentParser,
    arguments: Sequence[str] | None = None,
    advice: str = "Run with --help for every key",
) -> jsonargparse.Namespace:
    """What the command line says, dataclasses built. `parser` is one with `exit_on_error=False`.

    Raises `UserError` naming the key for anything that does not fit, and ending in `advice`.
    """
    try:
        return parser.instantiate(parser.parse_args(arguments))
    except (argparse.ArgumentError, jsonargparse.ArgumentError) as error:
        text = " ".join(str(error).split())
        raise UserError(f"{text.rstrip('.')}. {advice}.") from None
    except UnicodeDecodeError:
        fail("the --config file is not UTF-8 text", "Give a YAML file")


def say(line: str) -> None:
    """Tell the person at the command line what is being done; results go to standard output."""
    print(line, file=sys.stderr, flush=True)


def one_line(text: str, length: int) -> str:
    """A text on one line, of at most `length` characters (at least 3)."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 3] + "..."
