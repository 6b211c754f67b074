"""Changing a memory store: segments are prepared beside it, and one `commit` makes them count.

What a killed writer leaves behind is found again by its key (`find`) and need not be made twice.
"""

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clara_jax.corpus.passages import Passage
from clara_jax.errors import fail
from clara_jax.retrieval.integrity import damaged_segments
from clara_jax.retrieval.manifest import (
    NAME,
    Manifest,
    StoreSettings,
    fail_no_store,
    read_documents_table,
    read_manifest,
)
from clara_jax.retrieval.objects import Objects
from clara_jax.retrieval.segments import CHUNK_BYTES, Segment, find_segment, read_passages, write_segment, write_table

_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("digest", pa.binary(16)),  # of the document's title and text
        ("segment", pa.int32()),
        ("first", pa.int32()),  # its first passage's row in the segment
        ("rows", pa.int32()),
    ]
)


class StoreWriter:
    """One change of a store, from the generation that was committed when it was opened to the next."""

    def __init__(self, location: str | Path, settings: StoreSettings | None = None):
        """Open a store, or, with `settings`, begin one where there is none.

        Raises `UserError` where there is no store and no settings are given, and for a store of other settings.
        """
        self.objects = Objects(location)
        self._before, self._version = read_manifest(self.objects)
        if self._before is not None:
            if settings is not None:
                _require_same(self._before.settings, settings, str(location))
            self.settings = self._before.settings
            self.documents = read_documents_table(self.objects, self._before)
        elif settings is None:
            fail_no_store(str(location))
        else:
            self.settings, self.documents = settings, _SCHEMA.empty_table()

    def digests(self) -> dict[str, bytes]:
        """The digest of each document of the store, by its id."""
        return dict(zip(self.documents["id"].to_pylist(), self.documents["digest"].to_pylist(), strict=True))

    def drop_damaged(self) -> list[str]:
        """Leave out the documents of damaged segments, as if they had been deleted; what was wrong, a line each.

        The segments' objects are deleted, so that none of them is found again.
        """
        if self._before is None:
            return []
        problems = damaged_segments(self.objects, self._before)
        for number in problems:
            self.objects.delete([self._before.segments[number].marker])
        kept = pc.invert(pc.is_in(self.documents["segment"], pa.array(list(problems), pa.int32())))
        self.documents = self.documents.filter(kept)
        return list(problems.values())

    def find(self, key: str) -> Segment | None:
        """The segment of that key, if it was written whole: by this writer, or by one that never came to commit."""
        return find_segment(self.objects, key)

    def write(
        self, key: str, passages: Sequence[Passage], memories: np.ndarray, chunk_bytes: int = CHUNK_BYTES
    ) -> Segment:
        """Write a segment (see `write_segment`); it counts from `commit` on."""
        return write_segment(self.objects, key, passages, memories, self.settings.memory_type, chunk_bytes)

    def commit(self, added: Iterable[tuple[Segment, dict[str, bytes]]], removed: Collection[str]) -> Manifest:
        """Make a new generation: without the documents `removed`, with those of the segments `added`.

        `added` gives each segment with the digests of its documents, by id; they replace what the store has of the
        same ids. Objects that neither this generation nor the one before needs are deleted. Raises `UserError` if
        the store was changed by another writer in the meantime; nothing is lost then.
        """
        segments = list(self._before.segments) if self._before else []
        tables = []
        for segment, digests in added:
            tables.append(_documents_of(self.objects, segment, len(segments), digests))
            segments.append(segment)
        new = pa.concat_tables([_SCHEMA.empty_table(), *tables])
        gone = pc.is_in(self.documents["id"], pa.concat_arrays([pa.array(removed, pa.string()), *new["id"].chunks]))
        documents = pa.concat_tables([self.documents.filter(pc.invert(gone)), new])
        documents, kept = _renumbered(documents, segments)
        generation = self._before.generation + 1 if self._before else 1
        passages = int(np.sum(documents["rows"].to_numpy(), dtype=np.int64))
        table, checksum = write_table(self.objects, "documents", documents)
        manifest = Manifest(self.settings, generation, documents.num_rows, passages, tuple(kept), table, checksum)
        if not self.objects.replace(NAME, manifest.to_json(), self._version):
            fail(
                f"{self.objects.location} was changed by another process meanwhile",
                "Give the same command again",
            )
        needed = {NAME, *manifest.names(), *(self._before.names() if self._before else ())}
        self.objects.delete(name for name in self.objects.names() if name not in needed)
        return manifest


def _documents_of(objects: Objects, segment: Segment, number: int, digests: dict[str, bytes]) -> pa.Table:
    """The rows of the document table for one segment; a document's passages stand together in it."""
    names = read_passages(objects, segment)["document"].to_pylist()
    firsts = [row for row, name in enumerate(names) if row == 0 or names[row - 1] != name]
    counts = np.diff([*firsts, len(names)])
    ids = [names[row] for row in firsts]
    columns = [ids, [digests[name] for name in ids], [number] * len(ids), firsts, counts]
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)], _SCHEMA)


def _renumbered(documents: pa.Table, segments: Sequence[Segment]) -> tuple[pa.Table, list[Segment]]:
    """The table and the segments that it still needs, numbered without gaps."""
    used = np.unique(documents["segment"].to_numpy())
    numbers = np.searchsorted(used, documents["segment"].to_numpy())
    place = documents.schema.get_field_index("segment")
    return documents.set_column(place, "segment", pa.array(numbers, pa.int32())), [segments[n] for n in used]


def _require_same(has: StoreSettings, asked: StoreSettings, location: str) -> None:
    has.require(asked.compressor, location)
    for field in dataclasses.fields(StoreSettings):
        ours, theirs = getattr(asked, field.name), getattr(has, field.name)
        if ours != theirs:
            fail(f"{location} was made with {field.name} {theirs}, now it is {ours}", "Give the same, or a new store")
