"""Search without scoring every memory: FAISS finds candidates by their means, exact cosines rank them.

FAISS holds one float32 vector per memory, the normalised mean over its memory tokens: so many times fewer numbers than
the memories have as they have tokens. A memory whose mean is not among the candidates is not found (see `recall_of`).
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from clara_jax.corpus.passages import Passage
from clara_jax.errors import fail, require_package
from clara_jax.retrieval.index import MemoryIndex
from clara_jax.retrieval.search import TILE, Found, search
from clara_jax.sharding import MeshConfig, make_mesh

_SAMPLE = 65_536  # means that an index which must be trained is trained on
_PIECE_BYTES = 32 << 20  # of candidates' memories in float32, read at a time


class FirstPass:
    """A `MemoryIndex` that scores only the `candidates` memories whose means are nearest to the query's.

    `factory` is FAISS's description of the index of the means: `Flat` (all of them are compared), `HNSW32`,
    `IVF1024,Flat`, ... It is built here, from all memories. Raises `UserError` for fewer candidates than 1, where FAISS
    is not installed, and where it refuses `factory`.
    """

    def __init__(self, index: MemoryIndex, candidates: int, factory: str = "Flat"):
        if candidates < 1:
            fail(f"the first pass is to give {candidates} candidates", "Ask for at least 1")
        self.index, self.candidates = index, candidates
        # Candidates are too few to be worth dividing: on many devices, most of a block would be padding.
        self._mesh = make_mesh(MeshConfig(1, 1, 1), jax.local_devices()[:1])
        self._means = _built(index, factory)

    def __len__(self) -> int:
        """Number of memories in all stores."""
        return len(self.index)

    def search(self, queries: Float[np.ndarray | Array, "queries memory hidden"], k: int) -> Found:
        """The k of largest cosine among each query's candidates; equal scores in order of index.

        -1, with the score -inf, where there are fewer than k candidates.
        """
        asked = np.asarray(queries, np.float32)
        rows = [self._of_query(query, numbers, k) for query, numbers in zip(asked, self._near(asked), strict=True)]
        if not rows:
            return Found(np.empty((0, k), np.int64), np.empty((0, k), np.float32))
        return Found(np.concatenate([r.indices for r in rows]), np.concatenate([r.scores for r in rows]))

    def memories(self, indices: Int[np.ndarray, " n"]) -> Float32[np.ndarray, "n memory hidden"]:
        """The memories of those numbers, float32."""
        return self.index.memories(indices)

    def passages(self, indices: Int[np.ndarray, " n"]) -> list[tuple[str, Passage]]:
        """The store (its location) and the passage of each number."""
        return self.index.passages(indices)

    def _near(self, queries: np.ndarray) -> list[np.ndarray]:
        """Each query's candidates, in order of index."""
        if not len(queries):
            return []
        _, numbers = self._means.search(_normalised_means(queries), min(self.candidates, len(self.index)))
        return [np.sort(row[row >= 0]) for row in numbers]

    def _of_query(self, query: np.ndarray, numbers: np.ndarray, k: int) -> Found:
        piece = max(1, _PIECE_BYTES // (4 * query.size) // TILE) * TILE
        starts = range(0, len(numbers), piece)
        blocks = (self.index.memories(numbers[s : s + piece]).reshape(-1, query.size) for s in starts)
        found = search(query.reshape(1, -1), blocks, k, self._mesh, piece)
        there = found.indices >= 0
        indices = np.full_like(found.indices, -1)
        indices[there] = numbers[found.indices[there]]
        return Found(indices, found.scores)


def recall_of(found: Found, exact: Found) -> float:
    """The share of the memories that the `exact` search found which `found` has too, over all queries."""
    there = [np.isin(theirs[theirs >= 0], ours) for ours, theirs in zip(found.indices, exact.indices, strict=True)]
    return float(np.mean(np.concatenate(there)))


def _built(index: MemoryIndex, factory: str) -> Any:
    """FAISS's index of all means."""
    faiss = require_package("faiss", "a first pass", "clara_jax[faiss]")
    hidden = index.stores[0].settings.hidden
    try:
        means = faiss.index_factory(hidden, factory, faiss.METRIC_INNER_PRODUCT)
        if not means.is_trained:
            means.train(_sample(index))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1][:200]
        fail(
            f"FAISS cannot make an index {factory!r} of {len(index)} means of {hidden} numbers ({reason})",
            "Give another --factory, such as Flat or HNSW32",
        )
    for block in _means_of(index):
        means.add(block)
    return means


def _sample(index: MemoryIndex) -> Float32[np.ndarray, "sample hidden"]:
    chosen = np.zeros(len(index), bool)
    chosen[np.random.default_rng(0).choice(len(index), min(_SAMPLE, len(index)), replace=False)] = True
    parts, first = [], 0
    for block in _means_of(index):
        parts.append(block[chosen[first : first + len(block)]])
        first += len(block)
    return np.concatenate(parts)


def _means_of(index: MemoryIndex) -> Iterator[Float32[np.ndarray, "n hidden"]]:
    hidden = index.stores[0].settings.hidden
    for block in index.blocks():
        yield _normalised_means(block.reshape(len(block), -1, hidden))


def _normalised_means(memories: np.ndarray) -> Float32[np.ndarray, "n hidden"]:
    """The means over memory tokens; the scales of int8 memories would cancel."""
    means = np.mean(memories, axis=1, dtype=np.float32)
    return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
