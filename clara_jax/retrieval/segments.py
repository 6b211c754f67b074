"""A segment of a memory store: some passages and their memories, written once and never changed.

    segments/KEY/memories/         zarr v3 array [passages, memory, hidden], one sharded object, a CRC32C in every chunk
    segments/KEY/passages.parquet  a row per passage: document, index, start, end, title, text (and scale of int8)
    segments/KEY/segment.json      the `Segment`; written last, so that a segment without it does not count

KEY is made of what the segment holds and of what it was made with, so a segment that is there need not be made again.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorstore as ts
from jaxtyping import Float, Float32

from clara_jax.corpus.passages import Passage
from clara_jax.errors import fail
from clara_jax.retrieval.objects import Objects

MemoryType = Literal["bfloat16", "int8", "float32"]
CHUNK_BYTES = 1 << 20  # whole blocks are read as a rule, for search
_MEND = "Run clara_jax.compress --repair with the corpus, or restore the store from a copy"


@dataclasses.dataclass(frozen=True)
class Segment:
    """A segment as a manifest lists it: its number of passages, and its objects with their SHA-256.

    The sum is empty for objects of the array, whose chunks carry their own.
    """

    key: str
    passages: int
    objects: dict[str, str]

    @property
    def folder(self) -> str:
        """Where its objects are, ending in a slash."""
        return folder_of(self.key)

    @property
    def marker(self) -> str:
        """The object that says that the others are all there."""
        return marker_of(self.key)


def folder_of(key: str) -> str:
    """Where a segment's objects are, ending in a slash."""
    return f"segments/{key}/"


def marker_of(key: str) -> str:
    """The object that says that a segment is whole: it holds the `Segment`, and is written last."""
    return f"{folder_of(key)}segment.json"


def write_segment(
    objects: Objects,
    key: str,
    passages: Sequence[Passage],
    memories: Float[np.ndarray, "passages memory hidden"],
    memory_type: MemoryType,
    chunk_bytes: int = CHUNK_BYTES,
) -> Segment:
    """Write a segment whole; what a killed writer has left of it is replaced.

    A chunk, the least that is read, has as many memories as `chunk_bytes` hold, and at least one.
    """
    folder = folder_of(key)
    columns: dict[str, Any] = {name: [getattr(passage, name) for passage in passages] for name in _COLUMNS}
    if memory_type == "int8":
        memories, columns["scale"] = quantize(memories)
    try:
        array = _create(objects, folder, memories.shape, memory_type, chunk_bytes)
        array.write(memories.astype(numpy_type(memory_type))).result()
    except ValueError as error:
        fail(f"{objects.path(folder)}memories cannot be written ({_said(error)})", "Check the free space")
    table = _to_parquet(pa.table(columns))
    objects.write(f"{folder}passages.parquet", table)
    sums = dict.fromkeys(objects.names(f"{folder}memories/"), "")
    sums[f"{folder}passages.parquet"] = hashlib.sha256(table).hexdigest()
    segment = Segment(key, len(passages), sums)
    objects.write(segment.marker, json.dumps(dataclasses.asdict(segment)).encode())
    return segment


def find_segment(objects: Objects, key: str) -> Segment | None:
    """The segment of that key if it has been written whole."""
    content = objects.read(marker_of(key))
    return None if content is None else Segment(**json.loads(content))


def open_memories(objects: Objects, segment: Segment) -> ts.TensorStore:
    """The segment's array, [passages, memory, hidden]; reading it checks the chunks (see `reading`)."""
    with reading(objects, segment):
        return objects.array(f"{segment.folder}memories/")


def read_passages(objects: Objects, segment: Segment) -> pa.Table:
    """The segment's table of passages, its checksum checked."""
    name = f"{segment.folder}passages.parquet"
    return read_table(objects, name, segment.objects[name])


def read_table(objects: Objects, name: str, checksum: str, mend: str = _MEND) -> pa.Table:
    """A Parquet object. Raises `UserError`, which says how to `mend` it, if it is missing or damaged."""
    content = objects.read(name)
    if content is None:
        fail(f"{objects.path(name)} is missing", mend)
    if hashlib.sha256(content).hexdigest() != checksum:
        fail(f"{objects.path(name)} is damaged: its checksum is not the recorded one", mend)
    # On this thread alone: Arrow's own may hold the bytes while the interpreter ends, which then aborts (status 134).
    return pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)


def write_table(objects: Objects, folder: str, table: pa.Table) -> tuple[str, str]:
    """Write a Parquet object named after its SHA-256; the name and the sum."""
    content = _to_parquet(table)
    checksum = hashlib.sha256(content).hexdigest()
    name = f"{folder}/{checksum[:16]}.parquet"
    objects.write(name, content)
    return name, checksum


@contextlib.contextmanager
def reading(objects: Objects, segment: Segment) -> Iterator[None]:
    """TensorStore's errors in the block become `UserError`s that name the segment and what to do."""
    try:
        yield
    except ValueError as error:
        what = "is damaged" if "DATA_LOSS" in str(error) else "cannot be read"
        fail(f"{objects.path(segment.folder)}memories {what} ({_said(error)})", _MEND)


def quantize(
    memories: Float[np.ndarray, "passages memory hidden"],
) -> tuple[np.ndarray, Float32[np.ndarray, " passages"]]:
    """Memories as int8 with one scale each, memory ~ int8 * scale: the largest entry of a memory becomes 127."""
    wide = memories.astype(np.float32)
    scale = np.abs(wide).max(axis=(1, 2)) / 127
    scale = np.where(scale > 0, scale, 1).astype(np.float32)  # a memory of zeros
    return np.rint(wide / scale[:, None, None]).astype(np.int8), scale


_COLUMNS = ("document", "index", "start", "end", "title", "text")
_NUMPY_TYPES: dict[MemoryType, Any] = {"bfloat16": ml_dtypes.bfloat16, "int8": np.int8, "float32": np.float32}


def numpy_type(memory_type: MemoryType) -> np.dtype:
    """The type of the stored numbers."""
    return np.dtype(_NUMPY_TYPES[memory_type])


def _create(
    objects: Objects, folder: str, shape: tuple[int, ...], memory_type: MemoryType, chunk_bytes: int
) -> ts.TensorStore:
    rows, memory, hidden = shape
    chunk = min(rows, max(1, chunk_bytes // (memory * hidden * numpy_type(memory_type).itemsize)))
    plain = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    shard = {"chunk_shape": [chunk, memory, hidden], "codecs": plain, "index_codecs": plain}
    shard_shape = [-(-rows // chunk) * chunk, memory, hidden]
    metadata = {
        "shape": list(shape),
        "data_type": memory_type,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard_shape}},
        "codecs": [{"name": "sharding_indexed", "configuration": shard}],
    }
    return objects.array(
        f"{folder}memories/",
        metadata=metadata,
        # Chunks of zeros would else be left out, and could not be told from chunks that are lost.
        store_data_equal_to_fill_value=True,
        create=True,
        delete_existing=True,
    )


def _said(error: Exception) -> str:
    return " ".join(str(error).split(" [tensorstore_spec")[0].split())


def _to_parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
