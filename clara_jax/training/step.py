"""One optimizer step over the mesh: `jax.jit` of a `shard_map` over the data axis.

Inside the map every data shard computes the gradient of its own rows, micro-batch by micro-batch, and the shards
exchange one thing: the sum of the adapters' gradients. Over `fsdp` and `tensor` the compiler divides the work as
the parameters lie (`clara_jax.sharding`). Losses are sums over the counts of the whole batch, so that neither
the mesh nor the number of micro-batches changes the result.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import PRNGKeyArray

from clara_jax.data.collate import Batch
from clara_jax.errors import fail
from clara_jax.models.roles import Params
from clara_jax.sharding import DATA, FSDP, on_mesh
from clara_jax.training.objectives import Counts, Metrics, Objective, counts
from clara_jax.training.state import TrainState

T = TypeVar("T")
Step = Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]
Evaluate = Callable[[Params, Params, Batch, Counts], Metrics]


def make_step(
    objective: Objective, optimizer: optax.GradientTransformation, mesh: Mesh, micro_batches: int = 1
) -> Step:
    """`(state, frozen, batch) -> (state, metrics)`; the state's memory is reused.

    Each data shard cuts its rows into `micro_batches` parts, computed one after the other. Dropout of step n is
    drawn from the run's key folded with n, so that it does not depend on where a run was interrupted.
    """
    map_shards, sum_shards, own = _data_shards(mesh)

    def gradients_of_shard(
        trainable: Params, frozen: Params, batch: Batch, rng: PRNGKeyArray
    ) -> tuple[Params, Metrics]:
        totals = sum_shards(counts(batch))
        # Without this, automatic differentiation would sum over the data shards once per micro-batch.
        trainable = own(trainable)

        def of_part(part: Batch) -> tuple[Params, Metrics]:
            value_and_grad = jax.value_and_grad(objective, has_aux=True)
            (_, metrics), gradients = value_and_grad(trainable, frozen, part, rng, totals)
            return gradients, _sums(metrics)

        if micro_batches == 1:
            return sum_shards(of_part(batch))
        leaves, structure = jax.tree.flatten(batch)
        parts = [_cut(leaf, micro_batches) for leaf in leaves]

        def add(sums: tuple[Params, Metrics], part: list[jax.Array]) -> tuple[tuple[Params, Metrics], None]:
            return jax.tree.map(jnp.add, sums, of_part(jax.tree.unflatten(structure, part))), None

        first = jax.tree.unflatten(structure, [part[0] for part in parts])
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(of_part, first))
        return sum_shards(jax.lax.scan(add, own(zeros), parts)[0])

    sharded = map_shards(gradients_of_shard, (P(), P(), P(DATA), P()))

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        gradients, metrics = sharded(state.trainable, frozen, batch, jax.random.fold_in(state.rng, state.step))
        updates, moments = optimizer.update(gradients, state.optimizer, state.trainable)
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        trainable = optax.apply_updates(state.trainable, updates)
        return TrainState(state.step + 1, trainable, moments, state.rng), metrics

    return jax.jit(step, donate_argnums=0)


def make_evaluation(objective: Objective, mesh: Mesh) -> Evaluate:
    """`(trainable, frozen, batch, totals) -> metrics` of one batch, without dropout.

    With the counts of a whole data set as `totals`, the metrics of its batches add up to those of the whole.
    """
    map_shards, sum_shards, _ = _data_shards(mesh)

    def of_shard(trainable: Params, frozen: Params, batch: Batch, totals: Counts) -> Metrics:
        _, metrics = objective(trainable, frozen, batch, None, totals)
        return sum_shards(_sums(metrics))

    return jax.jit(map_shards(of_shard, (P(), P(), P(DATA), P())))


def check_batch(mesh: Mesh, batch_size: int, micro_batches: int = 1, key: str = "batch_size") -> None:
    """Refuse a batch, named `key`, that the mesh and the micro-batches do not divide."""
    devices = mesh.shape[DATA] * mesh.shape[FSDP]
    if batch_size % (devices * micro_batches):
        parts = f" x {micro_batches} micro_batches" if micro_batches > 1 else ""
        fail(
            f"{key} is {batch_size}, which {devices} devices (mesh.data x mesh.fsdp){parts} do not divide",
            f"Choose a multiple of {devices * micro_batches}",
        )


def _data_shards(mesh: Mesh) -> tuple[Callable[..., Callable], Callable[[T], T], Callable[[T], T]]:
    """`shard_map` over the data axis, the sum over its shards, and "each shard has its own copy".

    With one data shard all three are left out: XLA's partitioner refuses a collective over an axis of one device.
    """
    if mesh.shape[DATA] == 1:
        return lambda f, in_specs: on_mesh(mesh, f), lambda x: x, lambda x: x

    def map_shards(f: Callable, in_specs: tuple[P, ...]) -> Callable:
        return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=P(), axis_names={DATA})

    return map_shards, lambda x: jax.lax.psum(x, DATA), lambda x: jax.lax.pcast(x, (DATA,), to="varying")


def _sums(metrics: Metrics) -> Metrics:
    """What adds up over the parts of a batch."""
    return {name: value for name, value in metrics.items() if name == "retrieval" or value.ndim == 0}


def _cut(leaf: jax.Array, parts: int) -> jax.Array:
    """[rows, ...] as [parts, rows / parts, ...], part p taking every `parts`-th row from p on.

    Taken in strides, the parts lie over the fsdp axis as the whole does, and no row has to move.
    """
    return jnp.swapaxes(leaf.reshape(leaf.shape[0] // parts, parts, *leaf.shape[1:]), 0, 1)
