"""Search: a wrong or unstable ranking hands the generator the wrong memories, and no message says so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clara_jax.errors import UserError
from clara_jax.retrieval import search as module
from clara_jax.retrieval.search import TILE, Found, merge, search
from clara_jax.sharding import MeshConfig, make_mesh

WIDTH = 48
ALONE = (1, 1, 1)


def mesh(shape=ALONE):
    return make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])


def oracle(queries, memories, k):
    """(indices, cosines) in float64, equal memories in order of index."""
    queries, memories = np.asarray(queries, np.float64), np.asarray(memories, np.float64)
    memories, same = np.unique(memories, axis=0, return_inverse=True)  # equal memories: one score
    lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(memories, axis=1)
    scores = (queries @ memories.T / np.maximum(lengths, 1e-12))[:, same.reshape(-1)]
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return best, np.take_along_axis(scores, best, axis=1)


def store(rows, dtype=np.float32, seed=0, width=WIDTH):
    """Memories of which a third are copies of others, anywhere."""
    rng = np.random.default_rng(seed)
    memories = rng.standard_normal((rows, width))
    memories = np.round(40 * memories).clip(-127, 127) if dtype == np.int8 else memories
    memories = memories.astype(dtype)
    memories[rng.integers(0, rows, rows // 3)] = memories[rng.choice(rng.integers(0, rows, 12), rows // 3)]
    return memories


def queries_for(memories, count, seed=1):
    rng = np.random.default_rng(seed)
    near = memories[rng.integers(0, len(memories), count)].astype(np.float32)
    return (near / np.linalg.norm(near, axis=1, keepdims=True) + 0.05 * rng.standard_normal(near.shape)).astype(
        np.float32
    )


def check(found, queries, memories, k):
    indices, scores = oracle(queries, memories, k)
    np.testing.assert_array_equal(found.indices, indices)
    np.testing.assert_allclose(found.scores, scores, atol=1e-6)


@pytest.mark.parametrize("shape", [ALONE, (8, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, jnp.bfloat16, np.int8])
def test_equals_the_oracle(shape, dtype):
    """A wrong rank, or copies of a passage out of order, on some mesh or for some type that a store may have."""
    memories = store(3000, dtype)
    queries = queries_for(memories, 5)
    check(
        search(queries, [memories[:1700], memories[1700:1703], memories[1703:]], 150, mesh(shape), 700),
        queries,
        memories,
        150,
    )


@pytest.mark.parametrize("width", [1, 37, 515])
@pytest.mark.parametrize("count", [1, 3, 8, 19])
def test_equal_memories_get_equal_scores_wherever_they_lie(width, count):
    """Copies in an order that depends on where in a tile they lie: a rerun with another block size differs."""
    rng = np.random.default_rng(width)
    memories = np.repeat(rng.standard_normal((1, width), np.float32), 3 * TILE - 5, axis=0)
    queries = rng.standard_normal((count, width), np.float32)
    found = search(queries, [memories], len(memories), mesh())
    assert all(len(np.unique(row)) == 1 for row in found.scores)
    np.testing.assert_array_equal(found.indices, np.tile(np.arange(len(memories)), (count, 1)))


def test_blocks_meshes_and_batches_change_nothing():
    """Scores or places that move when a store is cut otherwise, or searched by more devices."""
    memories = store(2500)
    queries = queries_for(memories, 9)
    whole = search(queries, [memories], 70, mesh())
    for cut, shape, rows in (([1, 2400], ALONE, 300), ([900], (8, 1, 1), 10**6), ([], (4, 1, 2), 1)):
        found = search(queries, np.split(memories, cut), 70, mesh(shape), rows)
        np.testing.assert_array_equal(found.indices, whole.indices)
        np.testing.assert_array_equal(found.scores, whole.scores)


def test_scale_of_int8_memories_cancels():
    """Memories ranked by how they were quantised and not by what they say."""
    memories = store(500, np.int8)
    scale = np.random.default_rng(2).uniform(0.001, 3.0, 500).astype(np.float32)
    queries = queries_for(memories, 3)
    found = search(queries, [(memories, scale)], 20, mesh())
    np.testing.assert_array_equal(found.indices, search(queries, [memories], 20, mesh()).indices)
    _, scores = oracle(queries, memories * scale[:, None].astype(np.float64), 20)
    np.testing.assert_allclose(found.scores, scores, atol=1e-6)


def test_k_larger_than_the_store():
    """A passage that does not exist, or padding, handed to the generator."""
    memories = -np.abs(store(10))
    queries = np.abs(queries_for(memories, 2))  # every cosine is below padding's 0
    for k in (11, 3000):
        found = search(queries, [memories[:4], memories[4:4], memories[4:]], k, mesh((2, 1, 1)))
        check(Found(found.indices[:, :10], found.scores[:, :10]), queries, memories, 10)
        assert found.indices.shape == found.scores.shape == (2, k)
        assert (found.indices[:, 10:] == -1).all() and (found.scores[:, 10:] == -np.inf).all()


def test_empty_store_and_no_queries():
    """A crash, where there is nothing to find or nothing asked."""
    for blocks in ([], [np.zeros((0, WIDTH), np.float32)]):
        found = search(np.ones((2, WIDTH), np.float32), blocks, 3, mesh())
        np.testing.assert_array_equal(found.indices, np.full((2, 3), -1))
    assert search(np.ones((0, WIDTH), np.float32), [store(5)], 3, mesh()).indices.shape == (0, 3)


def test_zeros_and_nan():
    """One broken memory ranked before all others; signed zeros out of order."""
    memories = np.zeros((6, 2), np.float32)
    memories[1], memories[3], memories[4] = (np.nan, 1), (-1, 0), (0, 5)
    found = search(np.array([[1, 0], [-1, 0], [0, 0]], np.float32), [memories], 6, mesh())
    np.testing.assert_array_equal(found.indices, [[0, 2, 4, 5, 3, -1], [3, 0, 2, 4, 5, -1], [0, 2, 3, 4, 5, -1]])


def test_merge_keeps_order_of_index():
    """Ties between blocks out of order; indices past 2^31 cut short."""
    far = 2**40
    a = Found(np.array([[far, 3, -1]]), np.array([[0.5, 0.25, -np.inf]], np.float32))
    b = Found(np.array([[7, 9, far + 1]]), np.array([[0.5, 0.25, 0.125]], np.float32))
    for merged in (merge(a, b), merge(b, a)):
        np.testing.assert_array_equal(merged.indices, [[7, far, 3]])
        np.testing.assert_array_equal(merged.scores, np.array([[0.5, 0.5, 0.25]], np.float32))


def test_streams_a_memory_map_and_compiles_once(tmp_path, monkeypatch):
    """A store larger than device memory read at once, or a program compiled for every block."""
    memories = store(5 * TILE + 9, width=40)
    np.save(tmp_path / "m.npy", memories)
    sizes, put = [], module.place

    def placed(value, sharding):
        alive = [x for x in jax.live_arrays() if x.shape == (TILE, 40)]
        assert len(alive) <= 1, "more than two blocks on the devices"
        sizes.append(len(value))
        return put(value, sharding)

    monkeypatch.setattr(module, "place", placed)
    queries = queries_for(memories, 2)
    programs = module.top_k_of_block._cache_size()
    found = search(queries, [np.load(tmp_path / "m.npy", mmap_mode="r")], 4, mesh(), block_rows=TILE)
    check(found, queries, memories, 4)
    assert sizes[1:] == [TILE] * 6
    assert module.top_k_of_block._cache_size() == programs + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"block_rows": 0}, "block_rows is 0"),
        ({"queries": np.ones((1, 3), np.float32)}, r"shape \[5, 48\], and queries have 3"),
        ({"queries": np.full((1, WIDTH), np.nan, np.float32)}, "not finite"),
        ({"blocks": store(5)}, r"shape \[48\]"),
        ({"blocks": [store(5).astype(np.int32)]}, "int32"),
        ({"blocks": [store(5), (store(3, np.int8), np.ones(2, np.float32))]}, "starts at 5 has scales"),
        ({"blocks": [(store(3, np.int8), np.array([1, 0, 1], np.float32))]}, "3 positive"),
    ],
)
def test_bad_input(change, message):
    """A query reasoner of another model, or a damaged store, gives a ranking that means nothing."""
    arguments = {"queries": np.ones((1, WIDTH), np.float32), "blocks": [store(5)], "k": 2, "mesh": mesh()}
    with pytest.raises(UserError, match=message):
        search(**{**arguments, **change})
