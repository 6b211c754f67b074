"""A memory store in the formats of others: Arrow, or a NumPy array beside a Parquet table."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clara_jax.corpus.passages import Passage
from clara_jax.errors import fail
from clara_jax.files import new_folder
from clara_jax.retrieval.store import MemoryStore

Advance = Callable[[int, int], None]

_PIECE_BYTES = 32 << 20  # of memories in float32, at a time
_SCHEMA = pa.schema(
    [(field.name, pa.string() if field.type is str else pa.int64()) for field in dataclasses.fields(Passage)]
)


def export_arrow(store: MemoryStore, out: Path, progress: Advance = lambda done, total: None) -> None:
    """Write memories.arrow into the new folder `out`: an Arrow IPC file, a row per memory, in the store's order.

    Its columns are those of a passage and `vector`, the flattened memory: float32, a list of fixed size, memory *
    hidden. `progress` is told of the memories done and of all. Raises `UserError` where `out` is not empty or cannot
    be written, and for a damaged store.
    """
    width = store.settings.memory * store.settings.hidden
    schema = _SCHEMA.append(pa.field("vector", pa.list_(pa.float32(), width)))
    with new_folder(out) as partial, _writing(out), pa.ipc.new_file(str(partial / "memories.arrow"), schema) as file:
        for first, table in _pieces(store):
            memories = store.memories(np.arange(first, first + len(table)))
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(memories.reshape(-1)), width)
            file.write_table(table.append_column(schema.field("vector"), vectors))
            progress(first + len(table), len(store))


def export_numpy(store: MemoryStore, out: Path, progress: Advance = lambda done, total: None) -> None:
    """Write memories.npy [n, memory, hidden], float32, and passages.parquet, row for row the same, into `out`.

    As `export_arrow` otherwise. The array may be opened with `np.load(..., mmap_mode="r")`.
    """
    shape = (len(store), store.settings.memory, store.settings.hidden)
    with new_folder(out) as partial, _writing(out):
        if not len(store):  # an empty file cannot be mapped
            np.save(partial / "memories.npy", np.empty(shape, np.float32))
        with pq.ParquetWriter(partial / "passages.parquet", _SCHEMA) as file:
            for first, table in _pieces(store):
                rows = np.arange(first, first + len(table))
                mode = "r+" if first else "w+"
                # Opened anew for every piece, so that what is written does not count as this process's memory.
                array = np.lib.format.open_memmap(partial / "memories.npy", mode, np.float32, shape)
                array[first : first + len(table)] = store.memories(rows)
                array.flush()
                file.write_table(table)
                progress(first + len(table), len(store))


def _pieces(store: MemoryStore) -> Iterator[tuple[int, pa.Table]]:
    """(number of the first memory, passages): the whole store in order, a bounded part of a segment at a time."""
    rows = max(1, _PIECE_BYTES // (4 * store.settings.memory * store.settings.hidden))
    first = 0
    for table in store.tables():
        passages = table.select(_SCHEMA.names).cast(_SCHEMA)
        for start in range(0, len(passages), rows):
            piece = passages.slice(start, rows)
            yield first, piece
            first += len(piece)


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        fail(f"{out} cannot be written ({error.strerror or error})", "Check the free space")
