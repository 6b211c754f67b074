"""The JSON objects of a data set, each field checked where it is read.

What is wrong is a `UserError` that names file, place, field and what was expected.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from clara_jax.errors import fail


@dataclasses.dataclass(frozen=True)
class Fields:
    """One JSON object and where it stands: a file and a line, or a file and a number. A null is not there."""

    values: Mapping[str, Any]
    where: str

    def has(self, key: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(key) is not None

    def refuse(self, key: str, expected: str) -> NoReturn:
        """Raise `UserError`: the field is missing, or not what it must be."""
        if not self.has(key):
            fail(f"{self.where}: field '{key}' is missing", f"It must be {expected}")
        shown = repr(self.values[key])
        fail(f"{self.where}: field '{key}' is {shown[:57] + '...' * (len(shown) > 57)}", f"It must be {expected}")

    def text(self, key: str, may_be_blank: bool = False) -> str:
        """A text; unless `may_be_blank`, there is more in it than whitespace."""
        value: Any = self.values.get(key)
        if not is_text(value) or not (may_be_blank or value.strip()):
            self.refuse(key, "a text" if may_be_blank else "a text that is not blank")
        return value

    def optional(self, key: str) -> str:
        """A text that may be blank or missing: it is then empty."""
        return self.text(key, may_be_blank=True) if self.has(key) else ""

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts, none of them blank."""
        values = self.values.get(key)
        if not isinstance(values, list) or not all(is_text(value) and value.strip() for value in values):
            self.refuse(key, "a list of texts that are not blank")
        return tuple(values)

    def objects(self, key: str) -> list["Fields"]:
        """A list of JSON objects, each knowing its place."""
        values = self.values.get(key)
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            self.refuse(key, "a list of JSON objects")
        return [Fields(value, f"{self.where}, {key}[{i}]") for i, value in enumerate(values)]

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self.values.get(key)
        if type(value) is not bool:
            self.refuse(key, "true or false")
        return value

    def identity(self, keys: Sequence[str]) -> str | None:
        """The first of the fields that is there, a text or a whole number, as text; None where none is."""
        for key in filter(self.has, keys):
            return str(self.values[key]) if type(self.values[key]) is int else self.text(key)
        return None


def is_text(value: Any) -> bool:
    """Whether a value is a string that can be written as UTF-8 (a lone surrogate cannot)."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_objects(path: Path) -> Iterator[Fields]:
    """The JSON objects of a file, in order: one a line, or one list of them, or a single one over several lines.

    Raises `UserError` for a file that is none of these, while it is read: lines are read one at a time.
    """
    first = next((line for _, line in _lines(path)), b"")
    if first and not first.lstrip().startswith(b"[") and _is_json(first):
        for number, line in _lines(path):
            where = f"{path}, line {number}"
            yield _object(_decoded(line, where), where)
        return
    whole = _decoded(b"\n".join(line for _, line in _lines(path)), str(path)) if first else []
    for number, entry in enumerate(whole if isinstance(whole, list) else [whole], 1):
        yield _object(entry, f"{path}, entry {number}")


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a UTF-8 text file that are not blank, without their ends, each with its place."""
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        try:
            yield where, line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            fail(f"{where}: not UTF-8 (byte {error.start})", "Convert the file to UTF-8")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, and their numbers; ended by newline bytes alone: texts hold other separators."""
    try:
        with path.open("rb") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except OSError as error:
        fail(f"{path} cannot be read ({error.strerror})", "Check the path and its permissions")


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        return False
    return True


def _decoded(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        fail(f"{where}: not UTF-8 (byte {error.start})", "Convert it to UTF-8")
    except json.JSONDecodeError as error:
        fail(f"{where}: not JSON ({error.msg}, character {error.pos})", "Correct it, or copy the file again")
    except (ValueError, RecursionError) as error:
        fail(f"{where}: not JSON that can be read ({type(error).__name__})", "Correct it, or copy the file again")


def _object(value: Any, where: str) -> Fields:
    if not isinstance(value, dict):
        fail(f"{where}: a JSON {type(value).__name__}", "It must be a JSON object")
    return Fields(value, where)
