"""Arguments of a workload filled with random numbers, on their devices: for timing, where no value matters."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clara_jax.data.collate import Batch
from clara_jax.models.roles import EncoderInputs, GeneratorInputs
from clara_jax.planning.workload import Workload
from clara_jax.training.state import TrainState

_SPREAD = 0.02
_TOKENS = 16  # every vocabulary has so many


def random_arguments(workload: Workload) -> tuple[Any, ...]:
    """Weights, state and batch for `workload.function`. Every row is as long as its padding, so no column is wasted."""
    return tuple(_fill(argument) for argument in workload.arguments)


def _fill(tree: Any) -> Any:
    # The classes are declared for arrays, and hold shapes here.
    fields: dict[str, Any] = {}
    if isinstance(tree, TrainState | Batch):
        fields = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
    if isinstance(tree, TrainState):
        moments = jax.tree.map(lambda leaf: _constant(leaf, 0), tree.optimizer)
        return TrainState(_constant(fields["step"], 0), _fill(tree.trainable), moments, _key(fields["rng"]))
    if isinstance(tree, Batch):
        rows = np.arange(fields["rows"].shape[0], dtype=np.int32)
        parts = {name: _fill(value) for name, value in fields.items()}
        parts["rows"] = jax.device_put(rows, fields["rows"].sharding)
        if tree.positives is not None:  # the first candidate of each question
            first = np.arange(tree.positives.shape[1])[None] == np.zeros((len(rows), 1))
            parts["positives"] = jax.device_put(first, fields["positives"].sharding)
        return Batch(**parts)
    if isinstance(tree, EncoderInputs | GeneratorInputs):
        return _tokens(tree)
    return jax.tree_util.tree_map_with_path(_leaf, tree)


def _leaf(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return _constant(leaf, leaf.dtype == jnp.bool_)
    if any("norm" in str(entry) for entry in path):
        return _constant(leaf, 1)
    return _normal(leaf.shape, leaf.dtype.name, leaf.sharding)()


@functools.lru_cache
def _normal(shape: tuple[int, ...], dtype: str, sharding: Any) -> Any:
    # By rows of the leading axis: random numbers of a whole stack of weights would need twice its memory.
    def draw() -> jax.Array:
        keys = jax.random.split(jax.random.key(0), shape[0])
        return jax.lax.map(lambda key: (_SPREAD * jax.random.normal(key, shape[1:])).astype(dtype), keys)

    return jax.jit(draw, out_shardings=sharding)


def _constant(leaf: jax.ShapeDtypeStruct, value: float) -> jax.Array:
    return jax.jit(lambda: jnp.full(leaf.shape, value, leaf.dtype), out_shardings=leaf.sharding)()


def _key(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.device_put(jax.random.key(0), leaf.sharding)


def _tokens(inputs: Any) -> Any:
    """Tokens without padding; memory tokens and answers stand where collate puts them."""
    rng = np.random.default_rng(0)
    length = inputs.tokens.shape[-1]

    def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name in ("valid", "target_weights"):
            return np.ones(shape)
        if name == "memory_columns":
            return np.broadcast_to(np.arange(length - shape[-1], length), shape)
        if name == "target_columns":
            return np.broadcast_to(np.arange(length - shape[-1] - 1, length - 1), shape)
        if name == "slots":
            documents, memory = shape[1:]
            return np.broadcast_to(np.arange(documents)[:, None] * (memory + 1) + np.arange(memory), shape)
        return rng.integers(0, _TOKENS, shape)

    return type(inputs)(
        **{
            field.name: jax.device_put(values(field.name, leaf.shape).astype(leaf.dtype), leaf.sharding)
            for field in dataclasses.fields(inputs)
            for leaf in (getattr(inputs, field.name),)
        }
    )
