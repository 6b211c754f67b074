"""Documents of a corpus, read one by one from any number of sources.

A source is one of

- a `.jsonl` or `.json` file of lines, a `.parquet` file, a folder of Hugging Face datasets or a hub id
  `owner/name` (the last two may end in `:split`), with the fields

      {"id": "12", "title": "Ada Lovelace", "text": "..."}

  where the id may be called `_id` (as in BEIR's corpus.jsonl) or `docid` and may be an integer, the title may be
  missing, and the text may be called `contents` or `passage`; the first name that is there counts;
- a `.txt` or `.md` file, or a folder of them, searched to any depth. The id is the path within the folder, the
  title the first Markdown heading or the file's name.

A row without an id gets `NAME:NUMBER`, the name of its file or data set and its line (from 1) or row (from 0): such an
id changes when rows are put in before it. A field that is null is one that is not there.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from clara_jax.corpus.text_files import is_text, list_files, read_text, title_of
from clara_jax.data.records import BadRecordPolicy, FieldError
from clara_jax.data.sources import open_source
from clara_jax.errors import UserError, fail

ID_FIELDS = ("id", "_id", "docid")
TEXT_FIELDS = ("text", "contents", "passage")
COLUMNS = (*ID_FIELDS, "title", *TEXT_FIELDS)
_TABLES = (".jsonl", ".json", ".parquet")


@dataclasses.dataclass(frozen=True)
class Document:
    """One document of a corpus. `title` may be empty; `where` says where it was read, as in `corpus.jsonl, line 3`."""

    id: str
    title: str
    text: str
    where: str


@dataclasses.dataclass
class Reading:
    """What became of a corpus: counts, and the first place of each kind. It grows while documents are read."""

    documents: int = 0
    blank: int = 0
    bad: int = 0
    other_files: int = 0
    first_blank: str = ""
    first_bad: str = ""
    first_other_file: str = ""

    def remarks(self) -> list[str]:
        """A line for each kind of thing that was left out; empty if nothing was."""
        kinds = (
            (self.blank, "documents without text", self.first_blank),
            (self.bad, "documents that cannot be used", self.first_bad),
            (self.other_files, "files that are neither .txt nor .md", self.first_other_file),
        )
        return [f"left out {count} {what}, the first: {first}" for count, what, first in kinds if count]


Row = tuple[str, str, Any]  # the place, the id if the row has none, and its fields or what is wrong with it
Rows = Callable[[], Iterator[Row]]


def read_documents(
    names: Sequence[str], on_bad: BadRecordPolicy = "stop", reading: Reading | None = None
) -> Iterator[Document]:
    """The documents of all sources in their order, one at a time; only their ids' hashes stay in memory.

    All names are checked before this returns. Documents of only whitespace are left out and counted in `reading`, as
    are, if `on_bad` is `skip`, those that cannot be used (not UTF-8, not JSON, wrong fields).

    Raises `UserError` for a name that is no source, for a document that cannot be used if `on_bad` is `stop`, for an id
    that two documents have (whatever `on_bad` is), and at the end if there was no document at all.
    """
    if not names:
        fail("the corpus has no sources", "Name at least one file, folder or data set")
    reading = Reading() if reading is None else reading
    opened = [_open(name, reading) for name in names]
    return _checked(opened, ", ".join(names), on_bad, reading)


def _checked(opened: Sequence[Rows], name: str, on_bad: BadRecordPolicy, reading: Reading) -> Iterator[Document]:
    seen: set[int] = set()
    for number, (where, found) in enumerate(_parsed(opened)):
        if isinstance(found, FieldError):
            if on_bad == "stop":
                raise UserError(f"{where}: {found}. Correct the document, or leave it out with --on_bad skip.")
            reading.bad += 1
            reading.first_bad = reading.first_bad or f"{where}: {found}"
        elif not found.text.strip():
            reading.blank += 1
            reading.first_blank = reading.first_blank or where
        else:
            if hash(found.id) in seen:
                _refuse_duplicate(found, opened, number)
            seen.add(hash(found.id))
            reading.documents += 1
            yield found
    if not reading.documents:
        remarks = "; ".join(reading.remarks())
        fail(f"corpus {name} holds no documents{f' ({remarks})' if remarks else ''}", "Name files that hold text")


def _refuse_duplicate(document: Document, opened: Sequence[Rows], number: int) -> None:
    """Read again for the place of the same id among the first `number` rows; there is none if only hashes are equal."""
    for _, (where, found) in zip(range(number), _parsed(opened), strict=False):
        if isinstance(found, Document) and found.id == document.id and found.text.strip():
            fail(
                f"the id {document.id!r} is that of two documents: {where}, and {document.where}",
                "Remove one of them, or give it another id",
            )


def _parsed(opened: Iterable[Rows]) -> Iterator[tuple[str, Document | FieldError]]:
    for rows in opened:
        for where, fallback_id, fields in rows():
            try:
                yield where, _parse(where, fallback_id, fields)
            except FieldError as error:
                yield where, error


def _parse(where: str, fallback_id: str, fields: Any) -> Document:
    if isinstance(fields, FieldError):
        raise fields
    if not isinstance(fields, dict):
        raise FieldError(f"the document must be a JSON object, not {_kind(fields)}")
    id_field, title_field, text_field = (
        next((key for key in keys if fields.get(key) is not None), None)
        for keys in (ID_FIELDS, ("title",), TEXT_FIELDS)
    )
    if text_field is None:
        raise FieldError("field 'text' is missing (or 'contents', or 'passage')")
    return Document(
        _id(fields, id_field) if id_field else fallback_id,
        _text(fields, title_field) if title_field else "",
        _text(fields, text_field),
        where,
    )


def _id(fields: dict[str, Any], key: str) -> str:
    if type(fields[key]) is int:
        return str(fields[key])
    if not isinstance(fields[key], str) or not fields[key].strip():
        raise FieldError(f"field '{key}' must be a text or an integer, not {_kind(fields[key])}")
    return _text(fields, key)


def _text(fields: dict[str, Any], key: str) -> str:
    value = fields[key]
    if not isinstance(value, str):
        raise FieldError(f"field '{key}' must be a text, not {_kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise FieldError(f"field '{key}' holds a lone surrogate, which is not text") from None
    return value


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "an empty text"
    names = {dict: "an object", list: "a list", bool: "true or false", int: "an integer", float: "a number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


def _open(name: str, reading: Reading) -> Rows:
    path = Path(name)
    if path.is_file() and is_text(path):
        return functools.partial(_text_rows, path.parent, [path])
    if path.is_file() and path.suffix not in _TABLES:
        fail(
            f"corpus {name} is a file of unknown kind",
            "Give .jsonl, .json (a document per line), .parquet, .txt or .md, a folder, or a hub id",
        )
    if path.is_dir() and (texts := _texts_of(path, reading)):
        return functools.partial(_text_rows, path, texts)
    source = open_source(name, COLUMNS)

    def numbered() -> Iterator[Row]:
        for where, fields in source.rows():
            yield f"{name}, {where}", f"{path.name}:{where.split()[1]}", fields

    return numbered


def _texts_of(folder: Path, reading: Reading) -> list[Path]:
    """The folder's texts; none if it is one of data sets. Its other files are counted."""
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        return []
    files = list_files(folder)
    texts, others = [file for file in files if is_text(file)], [file for file in files if not is_text(file)]
    tables = [file for file in others if file.suffix in (".jsonl", ".parquet")]
    if texts and tables:
        fail(
            f"corpus {folder} holds texts ({texts[0].name}) and tables ({tables[0].name})",
            "Name the files or folders that are meant",
        )
    if not texts and not tables and not any(file.suffix in (".json", ".csv", ".arrow") for file in others):
        fail(f"corpus {folder} holds no .txt or .md file and no data set", "Check the path")
    if texts and others:
        reading.other_files += len(others)
        reading.first_other_file = reading.first_other_file or str(others[0])
    return texts


def _text_rows(folder: Path, files: Sequence[Path]) -> Iterator[Row]:
    for file in files:
        name = file.relative_to(folder).as_posix()
        try:
            text = read_text(file)
        except FieldError as error:
            yield str(file), name, error
        else:
            yield str(file), name, {"title": title_of(file, text), "text": text}
