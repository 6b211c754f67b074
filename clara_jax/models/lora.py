"""Low-rank adapters as parameter pytrees: y = x W + alpha / rank x dropout(x) A B (LoRA).

An adapter mirrors the base tree: `{"layers": {site: {"a": [layer, in, rank], "b": [layer, rank, out]}}}`,
float32. A site is a linear layer, or one fused group of them where the family keeps them in one matrix
(`DecoderConfig.adapter_sites`).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from clara_jax.errors import fail
from clara_jax.models.config import DecoderConfig
from clara_jax.models.precision import of_products
from clara_jax.sharding import vary_as

Adapter = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation of every linear layer (paper, Table 10).

    Args:
        rank: Width of the low-rank update.
        alpha: The update is scaled by alpha / rank.
        dropout: Share of the update's inputs dropped in training.

    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.rank < 1:
            fail(f"lora.rank is {self.rank}", "Give a rank of at least 1")
        if not self.alpha > 0:
            fail(f"lora.alpha is {self.alpha}", "Give a positive number")
        if not 0 <= self.dropout < 1:
            fail(f"lora.dropout is {self.dropout}", "Give a share in [0, 1)")


def adapter_shapes(config: DecoderConfig, rank: int) -> Adapter:
    """Shape and dtype of every leaf of an adapter (`jax.ShapeDtypeStruct`)."""
    layers = {}
    for site, targets in config.adapter_sites.items():
        size_in = config.projections[targets[0]][0]
        size_out = sum(config.projections[name][1] for name in targets)
        layers[site] = {
            "a": jax.ShapeDtypeStruct((config.num_layers, size_in, rank), jnp.float32),
            "b": jax.ShapeDtypeStruct((config.num_layers, rank, size_out), jnp.float32),
        }
    return {"layers": layers}


def init_adapter(rng: Array, config: DecoderConfig, rank: int) -> Adapter:
    """A fresh adapter: A uniform in +-1/sqrt(in) (PEFT's initialisation), B zero, so it changes nothing."""

    def init_leaf(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Array:
        if path[-1].key == "b":
            return jnp.zeros(leaf.shape, leaf.dtype)
        bound = 1 / math.sqrt(leaf.shape[1])
        key = jax.random.fold_in(rng, sites.index(path[-2].key))
        return jax.random.uniform(key, leaf.shape, leaf.dtype, -bound, bound)

    sites = list(config.adapter_sites)
    return jax.tree_util.tree_map_with_path(init_leaf, adapter_shapes(config, rank))


def merge_adapter(layers: dict[str, Any], adapter: Adapter, config: DecoderConfig, alpha: float) -> dict[str, Any]:
    """Stacked base layers with the adapter's update added to their kernels: the same function, by other sums."""
    merged = dict(layers)
    for site, targets in config.adapter_sites.items():
        a, b = (adapter["layers"][site][name] for name in ("a", "b"))
        update = alpha / a.shape[-1] * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        ends = np.cumsum([config.projections[name][1] for name in targets])[:-1]
        for name, part in zip(targets, jnp.split(update, ends, axis=-1), strict=True):
            merged[name] = {**layers[name], "kernel": layers[name]["kernel"] + part}
    return merged


def draw_kept(
    rng: PRNGKeyArray, rows: Int[Array, " rows"], share: float, shape: tuple[int, int]
) -> Bool[Array, "rows length features"]:
    """Which inputs dropout keeps, [rows, *shape]; every row has a key of its own.

    An input's number is hashed with its row's key: MurmurHash3's finaliser of their sum, times an odd number of the key
    (multiply-shift hashing). That takes a dozen integer operations where the input is read, and is made again in the
    backward pass; a cryptographic generator takes a hundred, and its words have to be stored.
    """
    columns, features = (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in (0, 1))
    number = columns * np.uint32(shape[1]) + features

    def of_row(row: Array) -> Array:
        start, factor = jax.random.bits(jax.random.fold_in(rng, row), (2,), jnp.uint32)
        mixed = number + start
        mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)
        mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
        return (mixed ^ (mixed >> 16)) * (factor | 1) < np.uint32(min(round(share * 2**32), 2**32 - 1))

    return jax.vmap(of_row)(rows)


def multiply_wide(narrow: Float[Array, "*rows rank"], b: Float[Array, "rank out"]) -> Float[Array, "*rows out"]:
    """The wide half of an adapter: narrow @ b, with the gradient of b as a product that has `narrow` on its left.

    As differentiation would have it, with the wide gradient on the left, XLA's CPU code turns that gradient first.
    """
    return _multiply_wide(narrow, vary_as(b, narrow))


@jax.custom_vjp
def _multiply_wide(narrow: Array, b: Array) -> Array:
    return jnp.matmul(narrow, b, precision=of_products(b.dtype))


def _multiply_wide_forward(narrow: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return _multiply_wide(narrow, b), (narrow, b)


def _multiply_wide_backward(factors: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    narrow, b = factors
    rows, of_rows = (x.reshape(-1, x.shape[-1]) for x in (narrow, gradient))
    precision = of_products(b.dtype)
    of_b = jax.lax.dot_general(rows, of_rows, (((0,), (0,)), ((), ())), precision=precision)
    return jnp.einsum("...o,ro->...r", gradient, b, precision=precision), of_b


_multiply_wide.defvjp(_multiply_wide_forward, _multiply_wide_backward)
