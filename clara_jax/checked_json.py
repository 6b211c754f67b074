"""JSON that others wrote, read with errors that name the file and the key."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clara_jax.errors import fail


def read_object(path: Path, fix: str) -> dict[str, Any]:
    """The JSON object in a file. `fix` is what to do where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        fail(f"{path} does not exist", fix)
    except (ValueError, RecursionError) as error:
        fail(f"{path} is not JSON ({type(error).__name__})", fix)
    if not isinstance(content, dict):
        fail(f"{path} holds a JSON {type(content).__name__}, not an object", fix)
    return content


def positive_int(fields: Mapping[str, Any], key: str) -> int:
    """A required whole number above zero."""
    if key not in fields:
        fail(f"key '{key}' is missing", "Download or copy the file again")
    value = fields[key]
    if type(value) is not int or value < 1:
        fail(f"'{key}' is {value!r}", "It must be a whole number above zero")
    return value


def number(fields: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A number; required where there is no default."""
    value = fields.get(key)
    value = default if value is None else value
    if value is None:
        fail(f"key '{key}' is missing", "Download or copy the file again")
    if isinstance(value, bool) or not isinstance(value, int | float):
        fail(f"'{key}' is {value!r}", "It must be a number")
    return float(value)
