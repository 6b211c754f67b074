"""A memory store to read: the memories of a corpus, their passages, and where each comes from.

    store = MemoryStore.open("stores/wiki")
    found = search(queries, store.blocks(), k=5)
    memories = store.memories(found.indices[0])
    passages = store.passages(found.indices[0])

Memories are numbered from 0 through all segments of the opened generation, dead ones (of documents that were deleted or
replaced since) left out. A store is a folder or a bucket, see `retrieval.objects`; `retrieval.writer` makes it.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import tensorstore as ts
from jaxtyping import Float32, Int, Int64

from clara_jax.corpus.passages import Passage
from clara_jax.errors import fail
from clara_jax.retrieval.manifest import Manifest, read_documents_table, require_manifest
from clara_jax.retrieval.objects import Objects
from clara_jax.retrieval.segments import numpy_type, open_memories, read_passages, reading

_TABLES = 16  # segments whose passages are kept once read


class MemoryStore:
    """One generation of a store. What is committed after it was opened is not seen."""

    def __init__(self, objects: Objects, manifest: Manifest):
        """Use `MemoryStore.open`."""
        self.objects, self.manifest = objects, manifest
        self.settings = manifest.settings
        self.documents = read_documents_table(objects, manifest)
        self._rows = live_rows(self.documents, len(manifest.segments))
        self._starts = np.cumsum([0, *(len(rows) for rows in self._rows)])
        self._arrays: dict[int, ts.TensorStore] = {}
        self._passages = functools.lru_cache(_TABLES)(lambda n: read_passages(objects, manifest.segments[n]))

    @classmethod
    def open(cls, location: str | Path, compressor: str | None = None) -> "MemoryStore":
        """The committed generation at a path or URL, all of its objects there.

        Raises `UserError` where there is no store, an object is missing, or, if the fingerprint `compressor` is given,
        the memories are those of another model.
        """
        objects = Objects(location)
        manifest = require_manifest(objects)
        if compressor is not None:
            manifest.settings.require(compressor, str(location))
        missing = sorted(manifest.names() - set(objects.names()))
        if missing:
            fail(
                f"{objects.path(missing[0])} is missing ({len(missing)} objects of the store are)",
                "Run clara_jax.compress --repair with the corpus, or restore the store from a copy",
            )
        return cls(objects, manifest)

    @property
    def location(self) -> str:
        """Its path or URL."""
        return self.objects.location

    def __len__(self) -> int:
        """Number of memories."""
        return int(self._starts[-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of one memory as it is stored."""
        return self.settings.memory * self.settings.hidden * numpy_type(self.settings.memory_type).itemsize

    def blocks(self, rows: int = 4096) -> Iterator[np.ndarray]:
        """All memories in order, `rows` at a time, flattened, as they are stored; one block ahead is being read.

        The scales of int8 memories are not read: they cancel in a cosine.
        """
        ahead: collections.deque[list[tuple[int, ts.Future]]] = collections.deque()
        for start in range(0, len(self), rows):
            ahead.append(self._start_reading(start, min(start + rows, len(self))))
            if len(ahead) == 2:
                yield self._finish_reading(ahead.popleft())
        while ahead:
            yield self._finish_reading(ahead.popleft())

    def memories(self, indices: Int[np.ndarray, " n"]) -> Float32[np.ndarray, "n memory hidden"]:
        """The memories of those numbers, float32. Raises `IndexError` for a number that no memory has."""
        found = np.empty((len(indices), self.settings.memory, self.settings.hidden), np.float32)
        for number, segment, rows in self._located(indices):
            with reading(self.objects, self.manifest.segments[segment]):
                read = np.asarray(self._array(segment)[rows].read().result()).astype(np.float32)
            if self.settings.memory_type == "int8":
                scale = self._passages(segment)["scale"].to_numpy()[rows]
                read *= scale[:, None, None]
            found[number] = read
        return found

    def passages(self, indices: Int[np.ndarray, " n"]) -> list[Passage]:
        """The passages of those numbers. Raises `IndexError` for a number that no memory has."""
        found: dict[int, Passage] = {}
        for number, segment, rows in self._located(indices):
            table = self._passages(segment).take(pa.array(rows))
            columns = [table[field.name].to_pylist() for field in dataclasses.fields(Passage)]
            found.update(zip(number.tolist(), (Passage(*row) for row in zip(*columns, strict=True)), strict=True))
        return [found[number] for number in range(len(indices))]

    def tables(self) -> Iterator[pa.Table]:
        """The passages of all memories in order, a table per segment (for export)."""
        for segment, rows in enumerate(self._rows):
            yield self._passages(segment).take(pa.array(rows))

    def _array(self, segment: int) -> ts.TensorStore:
        if segment not in self._arrays:
            self._arrays[segment] = open_memories(self.objects, self.manifest.segments[segment])
        return self._arrays[segment]

    def _start_reading(self, start: int, stop: int) -> list[tuple[int, ts.Future]]:
        """Reads of the memories `start` to `stop`: those of each segment, whole ranges where none is dead."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts = []
        for segment in range(first, len(self._rows)):
            if self._starts[segment] >= stop:
                break
            begin, end = (int(np.clip(x - self._starts[segment], 0, len(self._rows[segment]))) for x in (start, stop))
            rows = self._rows[segment][begin:end]
            if len(rows):
                whole = rows[-1] - rows[0] + 1 == len(rows)
                selection = slice(int(rows[0]), int(rows[-1]) + 1) if whole else rows
                parts.append((segment, self._array(segment)[selection].read()))
        return parts

    def _finish_reading(self, parts: Sequence[tuple[int, ts.Future]]) -> np.ndarray:
        arrays = []
        for segment, future in parts:
            with reading(self.objects, self.manifest.segments[segment]):
                arrays.append(np.asarray(future.result()))
        block = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        return block.reshape(len(block), -1)

    def _located(self, indices: Int[np.ndarray, " n"]) -> Iterator[tuple[np.ndarray, int, np.ndarray]]:
        """(places within `indices`, segment, rows of the segment), a triple per segment that is concerned."""
        if len(indices) and not (np.min(indices) >= 0 and np.max(indices) < len(self)):
            raise IndexError(f"{self.location} has {len(self)} memories, asked for {indices}")
        segments = np.searchsorted(self._starts, indices, side="right") - 1
        for segment in np.unique(segments):
            numbers = np.flatnonzero(segments == segment)
            rows = self._rows[segment][np.asarray(indices)[numbers] - self._starts[segment]]
            yield numbers, int(segment), rows


def live_rows(documents: pa.Table, segments: int) -> list[Int64[np.ndarray, " rows"]]:
    """The rows of each segment that belong to a document of the table, in order."""
    of, first, count = (documents[name].to_numpy() for name in ("segment", "first", "rows"))
    order = np.lexsort((first, of))
    of, first, count = of[order], first[order], count[order]
    ends = np.cumsum(count)
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - count, count)
    rows = np.repeat(first, count) + within
    parts = np.split(rows.astype(np.int64), np.searchsorted(np.repeat(of, count), np.arange(1, segments)))
    return parts[:segments]  # of no segments, np.split makes one part
