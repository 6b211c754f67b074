"""Several memory stores searched as one, on the devices if they fit there."""

import itertools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int

from clara_jax.corpus.passages import Passage
from clara_jax.errors import fail
from clara_jax.retrieval.search import TILE, Found, PlacedBlock, place_blocks, search_placed
from clara_jax.retrieval.store import MemoryStore
from clara_jax.sharding import MeshConfig, make_mesh

_FREE_BYTES = 4 << 30  # taken to be free where the devices do not say


class MemoryIndex:
    """Memories of all `stores`, numbered through in their order.

    They stay on the devices of `mesh` after the first search if they need at most `device_bytes` there (by default half
    of what is free, or 2 GiB where the devices do not say); else they are read from the stores at every search, in
    blocks of `block_bytes` (at least 256 memories on each device; by default 4 MB, or 64 MB for memories that stay). On
    the CPU streaming takes up to about forty times that: blocks being read and checked, on their way, and searched,
    and above all what the allocator keeps of them in the heaps of the reading threads.

    Raises `UserError` where there is no store.
    """

    def __init__(
        self,
        stores: Sequence[MemoryStore],
        mesh: Mesh | None = None,
        device_bytes: int | None = None,
        block_bytes: int | None = None,
    ):
        self.stores = tuple(stores)
        if not self.stores:
            fail("there is no memory store to search", "Name at least one")
        self._mesh = make_mesh(MeshConfig()) if mesh is None else mesh
        self._starts = np.cumsum([0, *(len(store) for store in self.stores)])
        room = free_device_bytes(self._mesh) // 2 if device_bytes is None else device_bytes
        self.resident = sum(len(store) * _bytes_kept(store) for store in self.stores) <= room
        tiles = self._mesh.size * TILE  # what a block is filled up to anyway
        size = block_bytes or ((64 << 20) if self.resident else (4 << 20))
        rows = size // max(store.row_bytes for store in self.stores)
        self._block_rows = max(1, rows // tiles) * tiles
        self._kept: list[PlacedBlock] | None = None

    def __len__(self) -> int:
        """Number of memories in all stores."""
        return int(self._starts[-1])

    def blocks(self) -> Iterator[np.ndarray]:
        """All memories in order, flattened, as they are stored, block by block."""
        return itertools.chain.from_iterable(store.blocks(self._block_rows) for store in self.stores)

    def search(self, queries: Float[np.ndarray | Array, "queries memory hidden"], k: int) -> Found:
        """The k memories of largest cosine for each query, exactly (`retrieval.search`)."""
        flat = queries.reshape(len(queries), -1)
        if self._kept is not None:
            return search_placed(flat, self._kept, k, self._mesh)
        if not self.resident:
            placed = place_blocks(self.blocks(), flat.shape[1], self._mesh, self._block_rows)
            return search_placed(flat, placed, k, self._mesh)
        kept = (block.astype(np.float32) if _widens(block.dtype) else block for block in self.blocks())
        self._kept = list(place_blocks(kept, flat.shape[1], self._mesh, self._block_rows))
        return search_placed(flat, self._kept, k, self._mesh)

    def memories(self, indices: Int[np.ndarray, " n"]) -> Float32[np.ndarray, "n memory hidden"]:
        """The memories of those numbers, float32."""
        found = np.empty((len(indices), *self._shape), np.float32)
        for store, places, numbers in self._located(indices):
            found[places] = store.memories(numbers)
        return found

    def passages(self, indices: Int[np.ndarray, " n"]) -> list[tuple[str, Passage]]:
        """The store (its location) and the passage of each number."""
        found: dict[int, tuple[str, Passage]] = {}
        for store, places, numbers in self._located(indices):
            for place, passage in zip(places.tolist(), store.passages(numbers), strict=True):
                found[place] = store.location, passage
        return [found[place] for place in range(len(indices))]

    @property
    def _shape(self) -> tuple[int, int]:
        settings = self.stores[0].settings
        return settings.memory, settings.hidden

    def _located(self, indices: Int[np.ndarray, " n"]) -> list[tuple[MemoryStore, np.ndarray, np.ndarray]]:
        of = np.searchsorted(self._starts, indices, side="right") - 1
        return [
            (self.stores[number], np.flatnonzero(of == number), indices[of == number] - self._starts[number])
            for number in np.unique(of)
        ]


def _widens(memory_type: str | np.dtype) -> bool:
    """Whether memories of that type are kept as float32: bfloat16 on the CPU, where XLA widens it slowly."""
    return str(memory_type) == "bfloat16" and jax.default_backend() == "cpu"


def _bytes_kept(store: MemoryStore) -> int:
    """Bytes of one memory of the store, if it is kept on the devices."""
    return store.row_bytes * (2 if _widens(store.settings.memory_type) else 1)


def free_device_bytes(mesh: Mesh) -> int:
    """Free memory of all devices of the mesh together."""
    stats = [device.memory_stats() for device in mesh.devices.flat]
    known = [s["bytes_limit"] - s["bytes_in_use"] for s in stats if s and "bytes_limit" in s]
    return sum(known) if known else _FREE_BYTES
