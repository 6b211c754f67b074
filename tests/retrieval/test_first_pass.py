"""The first pass: what it loses is lost to every answer, so what it may lose is fixed here."""

import dataclasses
import sys

import numpy as np
import pytest

from clara_jax.errors import UserError
from clara_jax.retrieval.first_pass import FirstPass, recall_of
from clara_jax.retrieval.index import MemoryIndex
from clara_jax.retrieval.search import Found
from clara_jax.retrieval.store import MemoryStore
from clara_jax.retrieval.writer import StoreWriter
from tests.retrieval.test_store import SETTINGS, passages_of


def store(location, memories, memory_type="bfloat16"):
    writer = StoreWriter(location, dataclasses.replace(SETTINGS, memory_type=memory_type))
    names = {f"d{n}": 1 for n in range(len(memories))}
    writer.commit([(writer.write("key", passages_of(names), memories), dict.fromkeys(names, bytes(16)))], [])
    return MemoryStore.open(location)


def random_memories(rows, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, 3, 16)).astype(np.float32)


def two_stores(folder, memory_type="bfloat16"):
    memories = random_memories(150)
    memories[[7, 90, 149]] = memories[3]  # ties, within a store and across both
    parts = [store(folder / "a", memories[:100], memory_type), store(folder / "b", memories[100:], memory_type)]
    return MemoryIndex(parts, device_bytes=0, block_bytes=2000), memories


@pytest.mark.parametrize("memory_type", ["bfloat16", "int8"])
@pytest.mark.parametrize("factory", ["Flat", "HNSW32", "IVF1,Flat"])
def test_with_all_candidates_it_is_exact_search(tmp_path, memory_type, factory):
    """A rank, a tie or a store's numbers that the first pass changes. Scores: both round in float32, 1e-6 is tested."""
    index, memories = two_stores(tmp_path, memory_type)
    queries = memories[[3, 20, 120]] + 0.1 * random_memories(3, seed=1)
    found, exact = FirstPass(index, 1000, factory).search(queries, 12), index.search(queries, 12)
    np.testing.assert_array_equal(found.indices, exact.indices)
    np.testing.assert_allclose(found.scores, exact.scores, atol=1e-6)
    assert found.indices[0, :4].tolist() == [3, 7, 90, 149]


@pytest.mark.parametrize("memory_type", ["bfloat16", "int8"])
@pytest.mark.parametrize("factory", ["Flat", "HNSW32"])
def test_finds_near_copies_among_few_candidates(tmp_path, memory_type, factory):
    """A mean that is taken over the wrong axis, or not normalised: what is nearly the query is not even scored.

    The three copies of a query differ from it by a tenth of its length, others by more than its length.
    """
    rng = np.random.default_rng(2)
    memories = random_memories(400) * rng.uniform(0.1, 10, (400, 1, 1)).astype(np.float32)
    queries = random_memories(5, seed=3) + 1
    planted = rng.permutation(400)[:15].reshape(5, 3)
    for query, rows in zip(queries, planted, strict=True):
        memories[rows] = query + 0.1 * rng.standard_normal((3, 3, 16))
    index = MemoryIndex([store(tmp_path / "s", memories, memory_type)])
    found = FirstPass(index, 8 + 15, factory).search(queries, 3)
    assert recall_of(found, index.search(queries, 3)) == 1
    assert [set(row) for row in found.indices.tolist()] == [set(rows) for rows in planted.tolist()]


def test_fewer_candidates_than_k(tmp_path):
    """A passage that does not exist handed to the generator."""
    index, memories = two_stores(tmp_path)
    first = FirstPass(index, 2)
    found = first.search(memories[20:22], 5)
    assert (found.indices[:, 2:] == -1).all() and (found.scores[:, 2:] == -np.inf).all()
    assert found.indices[:, 0].tolist() == [20, 21] and (found.indices[:, 1] >= 0).all()
    assert first.search(memories[:0], 5).indices.shape == (0, 5)
    assert len(first) == 150
    assert first.passages(np.array([149]))[0][1].document == "d49"
    np.testing.assert_array_equal(first.memories(np.array([149])), index.memories(np.array([149])))


def test_recall_counts_what_exists():
    """Places that hold no memory counted as found, or as missed."""
    scores = np.zeros((2, 3), np.float32)
    exact = Found(np.array([[1, 2, 3], [4, -1, -1]]), scores)
    assert recall_of(Found(np.array([[3, 9, -1], [4, -1, -1]]), scores), exact) == 0.5


def test_refusals(tmp_path, monkeypatch):
    """A message that does not say what to install or to give."""
    index, _ = two_stores(tmp_path)
    with pytest.raises(UserError, match="0 candidates"):
        FirstPass(index, 0)
    with pytest.raises(UserError, match="'Nonsense'"):
        FirstPass(index, 5, "Nonsense")
    with pytest.raises(UserError, match=r"IVF1024,Flat.*150 means"):  # more cells than memories to train them on
        FirstPass(index, 5, "IVF1024,Flat")
    with pytest.raises(UserError, match="no memory store"):
        MemoryIndex([])
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"clara_jax\[faiss\]"):
        FirstPass(index, 5)
