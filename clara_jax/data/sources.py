"""Sources of records: JSON Lines, Parquet, Hugging Face datasets on disk or on the hub, row by row.

Whatever a row holds, it becomes a record or a reason why not, together with where it stands.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from clara_jax.data.records import BadRecordPolicy, FieldError, Record, parse_record
from clara_jax.errors import UserError, fail

FIELDS = ("data_type", "docs", "question", "answer", "answers", "golden_answers", "pos_index")
_ROWS = 1000
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclasses.dataclass(frozen=True)
class Source:
    """A named source. `fingerprint` changes with its content; `rows` gives `(where, fields or what is wrong)`."""

    name: str
    fingerprint: str
    rows: Callable[[], Iterator[tuple[str, Any]]]

    def records(self) -> Iterator[tuple[str, Record | FieldError]]:
        """Each row's place (`line 13`, or `row 12 (from 0)` of a table) and its record, or why it is none."""
        for where, fields in self.rows():
            if isinstance(fields, FieldError):
                yield where, fields
                continue
            try:
                yield where, parse_record(fields)
            except FieldError as error:
                yield where, error
            except RecursionError:  # a value nested so deep that Python cannot even show it
                yield where, FieldError("the record is nested too deep")


class BadRecords:
    """What becomes of records that cannot be used: the first one stops the run, or all are counted."""

    def __init__(self, name: str, policy: BadRecordPolicy):
        self.name, self.policy = name, policy
        self.count = 0
        self.first: str | None = None

    def add(self, where: str, error: FieldError) -> None:
        """Count the record, or under `stop` raise a `UserError` with source, place, field and expectation."""
        if self.policy == "stop":
            raise UserError(f"{self.name}, {where}: {error}. Correct the record, or set data.on_bad_record to skip.")
        self.count += 1
        self.first = self.first or f"{where}: {error}"


def open_source(name: str, columns: Sequence[str] = FIELDS) -> Source:
    """The source of that name, checked to be there. Of tables only `columns` are read.

    A name is a `.jsonl` or `.json` file of lines, a `.parquet` file, a folder of Hugging Face datasets or a hub id
    `owner/name`; folder and hub id may end in `:split` (default `train`). Raises `UserError` for anything else.
    """
    check_source(name)
    if Path(name).is_file():
        return _file_source(Path(name), columns)
    if Path(name).is_dir():
        return _dataset_source(name, name, None, columns)
    place, _, split = name.partition(":")
    return _dataset_source(name, place, split or None, columns)


def check_source(name: str) -> None:
    """Refuse what cannot be a source, by a look at names alone; what a hub holds is not asked."""
    path = Path(name)
    if path.is_file() and path.suffix not in _READERS:
        fail(
            f"data source {name} is a file of unknown kind",
            "Give .jsonl or .json (a record per line) or .parquet, a folder of Hugging Face datasets, or a hub id",
        )
    place, _, split = name.partition(":")
    if path.exists() or (split and Path(place).is_dir()):
        return
    if path.suffix in _READERS or not _HUB_ID.fullmatch(place):
        fail(f"data source {name}: there is no such file or folder", "Check the path")


def _file_source(path: Path, columns: Sequence[str]) -> Source:
    try:
        with path.open("rb") as file:
            fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        fail(f"data file {path} cannot be read ({error.strerror})", "Check the file's permissions")
    return Source(str(path), fingerprint, lambda: _READERS[path.suffix](path, columns))


def _json_lines(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, Any]]:
    # Split at newline bytes alone: texts hold other line separators of Unicode.
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"line {number}", _decoded(line)
    except OSError as error:
        fail(f"data file {path} cannot be read ({error.strerror})", "Check the disk")


def _decoded(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return FieldError("the line is not UTF-8")
    except (ValueError, RecursionError):
        return FieldError("the line is not JSON")


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            found = [name for name in columns if name in file.schema_arrow.names]
            yield from _table_rows(file.iter_batches(_ROWS, columns=found))
    except (pa.ArrowException, OSError) as error:
        fail(f"{path} is not a whole Parquet file ({_one_line(error)})", "Write or download it again")


_READERS = {".jsonl": _json_lines, ".json": _json_lines, ".parquet": _parquet_rows}


def _dataset_source(name: str, place: str, split: str | None, columns: Sequence[str]) -> Source:
    try:
        dataset = _load_dataset(place, split)
    except UserError:
        raise
    except Exception as error:  # datasets passes on whatever its readers and its HTTP client raise
        reason = f"{type(error).__name__}: {_one_line(error)}"
        if Path(place).is_dir():
            fail(f"{name} cannot be read as a Hugging Face dataset ({reason})", "Check the path and the split")
        fail(
            f"{name} is neither a file nor a folder here, and cannot be had from the Hugging Face hub ({reason})",
            "Check the name, the split and the network",
        )
    found = [column for column in columns if column in dataset.column_names]
    tables = dataset.select_columns(found).with_format("arrow") if found else None

    def rows() -> Iterator[tuple[str, Any]]:
        if tables is None:
            return _table_rows(pa.table({"": pa.nulls(len(dataset))}).to_batches())
        return _table_rows(batch for table in tables.iter(_ROWS) for batch in table.to_batches())

    return Source(name, f"{dataset._fingerprint}:{dataset.split}", rows)


def _load_dataset(place: str, split: str | None) -> datasets.Dataset:
    saved = Path(place)
    if not ((saved / "state.json").exists() or (saved / "dataset_dict.json").exists()):
        return datasets.load_dataset(place, split=split or "train")
    found = datasets.load_from_disk(place)
    if isinstance(found, datasets.DatasetDict):
        if (split or "train") not in found:
            fail(f"{place} has no split {split or 'train'}", f"Name one of {', '.join(found)} as {place}:SPLIT")
        return found[split or "train"]
    if split not in (None, str(found.split)):
        fail(f"{place} holds a single dataset and no split {split}", f"Leave out ':{split}'")
    return found


def _table_rows(batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[str, Any]]:
    number = 0
    for batch in batches:
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError:
            rows = [_table_row(batch, row) for row in range(batch.num_rows)]
        for row in rows:
            yield f"row {number} (from 0)", row
            number += 1


def _table_row(batch: pa.RecordBatch, row: int) -> Any:
    try:
        return batch.slice(row, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return FieldError("the row holds a text that is not UTF-8")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
