"""What a memory store holds, as of one generation: the one object that says which others count.

A writer prepares everything beside it and then replaces `manifest.json` at once. A reader sees the generation before
or the one after, never a part of one.
"""

import dataclasses
import hashlib
import json
from typing import Any, NoReturn

import pyarrow as pa

from clara_jax.errors import fail
from clara_jax.retrieval.objects import Objects
from clara_jax.retrieval.segments import MemoryType, Segment, read_table

NAME = "manifest.json"
FORMAT = 1
_MEND = "Restore it from a copy, or compress the corpus into a new store"


@dataclasses.dataclass(frozen=True)
class StoreSettings:
    """What all memories of a store have in common.

    `compressor` is the fingerprint of the model that made them (`clara_jax.encoding.fingerprint`), [`memory`,
    `hidden`] their shape, `memory_type` how they are stored; passages have at most `limit` tokens and repeat at most
    `overlap`.
    """

    compressor: str
    memory: int
    hidden: int
    memory_type: MemoryType
    limit: int
    overlap: int

    def require(self, compressor: str, location: str) -> None:
        """Raise `UserError` where the memories at `location` are not those of the `compressor` of that fingerprint."""
        if self.compressor != compressor:
            fail(
                f"{location} holds memories of another compressor ({self.compressor}) than this model's ({compressor})",
                "Use the model that made the store, or compress the corpus with this one into a new store",
            )


@dataclasses.dataclass(frozen=True)
class Manifest:
    """One generation: its segments in order, the table of its documents with its SHA-256, and counts of both."""

    settings: StoreSettings
    generation: int
    documents: int
    passages: int
    segments: tuple[Segment, ...]
    table: str
    table_sum: str

    def names(self) -> set[str]:
        """Every object that this generation needs."""
        return {self.table, *(name for segment in self.segments for name in (segment.marker, *segment.objects))}

    def to_json(self) -> bytes:
        """The content of `manifest.json`."""
        content = dataclasses.asdict(self)
        return json.dumps({"format": FORMAT, "sum": _sum(content), "content": content}, indent=1).encode()


def read_manifest(objects: Objects) -> tuple[Manifest | None, bytes]:
    """The committed generation (none: there is no store yet), and the token with which it can be replaced.

    Raises `UserError` for a manifest of a newer format, or one that is damaged.
    """
    found, version = objects.read_version(NAME)
    if found is None:
        return None, version
    where = objects.path(NAME)
    try:
        whole = json.loads(found)
        written, content = whole["format"], whole["content"]
    except (ValueError, KeyError, TypeError) as error:
        fail(f"{where} is damaged ({type(error).__name__})", _MEND)
    if written != FORMAT:
        fail(f"{where} is of format {written}; this version of clara_jax reads format {FORMAT}", "Upgrade clara_jax")
    if _sum(content) != whole.get("sum"):
        fail(f"{where} is damaged: its checksum is not the recorded one", _MEND)
    settings = StoreSettings(**content.pop("settings"))
    segments = tuple(Segment(**segment) for segment in content.pop("segments"))
    return Manifest(settings=settings, segments=segments, **content), version


def require_manifest(objects: Objects) -> Manifest:
    """The committed generation, as `read_manifest`. Raises `UserError` where there is no store, too."""
    manifest, _ = read_manifest(objects)
    if manifest is None:
        fail_no_store(objects.location)
    return manifest


def fail_no_store(location: str) -> NoReturn:
    """Raise `UserError`: there is no store at `location`."""
    fail(f"{location} holds no memory store", "Make it with: python -m clara_jax.compress --store")


def read_documents_table(objects: Objects, manifest: Manifest) -> pa.Table:
    """The documents of a generation: id, digest, segment, first row and number of rows."""
    return read_table(objects, manifest.table, manifest.table_sum, _MEND)


def _sum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
