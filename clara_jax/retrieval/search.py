"""Exact cosine top-k over memories that need not fit on the devices.

Memories stream from the host or from disk in blocks of one shape. Each block is divided over all devices of the
mesh; every device keeps the best k of its part, the parts are gathered and merged there, and the host merges
blocks. While one block is searched the next is on its way, so two blocks are on the devices at most, and besides
them one float32 score for each query and memory of a block.

What is promised of the order:

- Memories whose vectors are equal get equal scores for a query, wherever they lie, and come in order of index:
  products are float32 and of whole tiles of `TILE` memories, so that a score is always summed in one order.
- Scores are float32 and differ from the exact cosine by rounding: less than 1e-7 in what was measured (width 4,096),
  1e-6 in what is tested. Unequal memories whose exact cosines lie nearer to each other than twice this may change
  places; others do not.
- Results do not depend on how the memories are cut into blocks or on the number of devices.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int, Int8, Int32, Int64

from clara_jax.errors import fail
from clara_jax.sharding import MeshConfig, make_mesh, place, replicated

# A device's part of a block is a whole number of tiles. Memories narrower than float32 are widened one tile at a time.
TILE = 256
# Queries are filled up to a multiple of this: fewer programs to compile, and no kernel of its own for one query.
QUERIES = 8

# Memories [n, d] of any float type or int8, alone or with one positive scale per memory [n].
Block = np.ndarray | tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class PlacedBlock:
    """Memories `first` to `first + rows` on the devices, and their lengths, filled up with zeros to a block's shape."""

    first: int
    rows: int
    memories: Float[Array, "filled width"] | Int8[Array, "filled width"]
    lengths: Float32[Array, " filled"]


@dataclasses.dataclass(frozen=True)
class Found:
    """The memories found for each query, best first.

    `indices[row, j]` numbers the memories through all blocks; -1, with the score -inf, where there are fewer than
    k. `scores` are cosines.
    """

    indices: Int64[np.ndarray, "queries k"]
    scores: Float32[np.ndarray, "queries k"]


def search(
    queries: Float[np.ndarray | Array, "queries width"],
    blocks: Iterable[Block],
    k: int,
    mesh: Mesh | None = None,
    block_rows: int = 4096,
) -> Found:
    """The k memories of largest cosine for each query, exactly; equal scores in order of index.

    A block may be longer than `block_rows` (for instance one memory map of a whole store): it is cut, and no more
    than `block_rows` of its memories, rounded up to whole tiles on every device, are read at a time. Blocks must
    not be written to before this returns. A scale of int8 memories is checked and otherwise unused, for it
    cancels in a cosine. A memory of zeros has the cosine 0; one with a NaN or an
    infinity is never found.

    Args:
        queries: Flattened queries.
        blocks: Flattened memories, in order of index; none at all is an empty store.
        k: How many to find; may exceed the number of memories (see `Found`).
        mesh: Devices to divide every block over; by default all.
        block_rows: Memories on the devices at a time, without those that are on their way.

    Raises:
        UserError: `k` or `block_rows` below 1, queries that are not finite, or a block that is not [n, width]
            of floats or int8, or whose scales are not n positive numbers.

    """
    mesh = make_mesh(MeshConfig()) if mesh is None else mesh
    return search_placed(queries, place_blocks(blocks, queries.shape[1], mesh, block_rows), k, mesh)


def place_blocks(blocks: Iterable[Block], width: int, mesh: Mesh, block_rows: int = 4096) -> Iterator[PlacedBlock]:
    """The blocks as `search` cuts them, each on its way to the devices when it is given out; see there."""
    if block_rows < 1:
        fail(f"block_rows is {block_rows}", "Give at least 1")
    divided = NamedSharding(mesh, P(mesh.axis_names))
    for first, rows, block in _cut(blocks, width, block_rows, mesh.size * TILE):
        memories = place(block, divided)
        yield PlacedBlock(first, rows, memories, lengths_of_block(memories, mesh))


def search_placed(
    queries: Float[np.ndarray | Array, "queries width"], blocks: Iterable[PlacedBlock], k: int, mesh: Mesh
) -> Found:
    """`search` in memories that lie on the devices of `mesh`, or come there one by one (`place_blocks`).

    A list of placed blocks can be searched again and again; an iterator of them needs the memory of two.
    """
    if k < 1:
        fail(f"k is {k}", "Give at least 1")
    asked = np.asarray(queries, np.float32)
    count = len(asked)
    if not np.isfinite(asked).all():
        fail("the queries hold numbers that are not finite in float32", "Check the model that made them")
    found = _nothing(count, k)
    if count == 0:
        return found
    on_devices = place(_fill_up(asked, -(-count // QUERIES) * QUERIES), replicated(mesh))
    searching = None
    for block in blocks:
        if searching is not None:  # wait for it only now, so that one block arrives while another is searched
            found = merge(found, _fetch(*searching, count, k))
        best = top_k_of_block(on_devices, block.memories, block.lengths, block.rows, k, mesh)
        searching = block.first, best
    return found if searching is None else merge(found, _fetch(*searching, count, k))


@functools.partial(jax.jit, static_argnames=("k", "mesh"))
def top_k_of_block(
    queries: Float32[Array, "queries width"],
    block: Float[Array, "rows width"] | Int8[Array, "rows width"],
    lengths: Float32[Array, " rows"],
    valid: int | Int[Array, ""],
    k: int,
    mesh: Mesh,
) -> tuple[Float32[Array, "queries best"], Int32[Array, "queries best"]]:
    """Scores, and places within the block, of the best of its first `valid` rows; best first, -inf for none.

    `best` is k, or fewer where the block has fewer rows. The block's rows lie over all axes of `mesh`, a whole
    number of tiles on each device. Indices are within the block because devices count in int32, and a store may
    hold more.
    """
    axes = mesh.axis_names

    def of_device(queries: Array, part: Array, lengths: Array, valid: Array) -> tuple[Array, Array]:
        rows = jax.lax.axis_index(axes) * part.shape[0] + jnp.arange(part.shape[0], dtype=jnp.int32)
        scores = _cosines(queries, part, lengths)
        scores = jnp.where((rows < valid) & ~jnp.isnan(scores), scores, -jnp.inf)
        best, places = jax.lax.top_k(scores, min(k, part.shape[0]))
        best, places = (jax.lax.all_gather(x, axes, axis=1, tiled=True) for x in (best, rows[places]))
        # Parts follow each other in order of index, so the earlier of equal scores has the lower index here too.
        best, order = jax.lax.top_k(best, min(k, best.shape[1]))
        return best, jnp.take_along_axis(places, order, axis=1)

    in_specs = (P(), P(axes), P(axes), P())
    divided = jax.shard_map(of_device, mesh=mesh, in_specs=in_specs, out_specs=(P(), P()), check_vma=False)
    return divided(queries, block, lengths, jnp.asarray(valid, jnp.int32))


@functools.partial(jax.jit, static_argnames="mesh")
def lengths_of_block(
    block: Float[Array, "rows width"] | Int8[Array, "rows width"], mesh: Mesh
) -> Float32[Array, " rows"]:
    """The lengths of a block's rows, which lie over all axes of `mesh`."""

    def of_device(part: Array) -> Array:
        return jax.lax.map(lambda tile: _lengths(tile.astype(jnp.float32)), _tiles(part)).reshape(-1)

    return jax.shard_map(of_device, mesh=mesh, in_specs=P(mesh.axis_names), out_specs=P(mesh.axis_names))(block)


def merge(a: Found, b: Found) -> Found:
    """The best of both for each query, as many as `a` has columns; equal scores in order of index."""
    indices = np.concatenate([a.indices, b.indices], axis=1)
    scores = np.concatenate([a.scores, b.scores], axis=1)
    best = np.lexsort((indices, -scores), axis=1)[:, : a.scores.shape[1]]
    return Found(np.take_along_axis(indices, best, axis=1), np.take_along_axis(scores, best, axis=1))


def _cosines(queries: Array, memories: Array, lengths: Array) -> Array:
    """Cosines [queries, rows] in float32; narrower memories are widened tile by tile."""

    def products(some: Array) -> Array:
        # Memories on the left, as the larger: with queries there, XLA's CPU code takes 1.4 to 3 times as long.
        wide = some.astype(jnp.float32)
        return jnp.einsum("td,qd->tq", wide, queries, precision=jax.lax.Precision.HIGHEST)

    if memories.dtype == jnp.float32:
        of_all = products(memories)
    else:
        of_all = jax.lax.map(products, _tiles(memories)).reshape(len(memories), -1)
    cosines = of_all / jnp.maximum(lengths[:, None] * _lengths(queries), 1e-12)
    # lax.top_k puts 0.0 before -0.0. (Transposed last: XLA turns a transposed product round, see above.)
    return jnp.where(cosines == 0, 0.0, cosines).T


def _tiles(memories: Array) -> Array:
    return memories.reshape(-1, TILE, memories.shape[1])


def _lengths(vectors: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(vectors), axis=1))


def _cut(blocks: Iterable[Block], width: int, block_rows: int, multiple: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """(index of the first memory, number of memories, memories filled up to the one block shape)."""
    first = shape = 0
    for block in blocks:
        memories = _checked(block, width, first)
        shape = shape or -(-min(len(memories), block_rows) // multiple) * multiple
        for start in range(0, len(memories), shape or 1):
            piece = memories[start : start + shape]
            piece = piece.astype(np.float32) if piece.dtype == np.float64 else piece
            yield first + start, len(piece), _fill_up(piece, shape)
        first += len(memories)


def _checked(block: Block, width: int, first: int) -> np.ndarray:
    memories, scale = block if isinstance(block, tuple) else (block, None)
    where = f"the block of memories that starts at {first}"
    if memories.ndim != 2 or memories.shape[1] != width:
        fail(
            f"{where} has the shape {list(memories.shape)}, and queries have {width} numbers each",
            "Search a store with the model that made it",
        )
    if memories.dtype != np.int8 and not jnp.issubdtype(memories.dtype, jnp.floating):
        fail(f"{where} is of type {memories.dtype}", "Give floats or int8")
    if scale is not None and (scale.shape != memories.shape[:1] or not np.all(scale > 0)):
        fail(f"{where} has scales that are not {len(memories)} positive numbers", "Give one to each memory")
    return memories


def _fill_up(rows: np.ndarray, count: int) -> np.ndarray:
    if len(rows) == count:
        return rows
    filled = np.zeros((count, rows.shape[1]), rows.dtype)
    filled[: len(rows)] = rows
    return filled


def _nothing(count: int, k: int) -> Found:
    return Found(np.full((count, k), -1, np.int64), np.full((count, k), -np.inf, np.float32))


def _fetch(first: int, best: tuple[Array, Array], count: int, k: int) -> Found:
    scores, places = (np.asarray(x)[:count] for x in best)
    return Found(np.where(scores == -np.inf, -1, first + places.astype(np.int64)), scores)
