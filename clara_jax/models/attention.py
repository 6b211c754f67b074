"""Grouped-query attention."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from clara_jax.models.precision import wide


def attend(
    query: Float[Array, "batch queries heads dim"],
    key: Float[Array, "batch kv_heads keys dim"],
    value: Float[Array, "batch kv_heads keys dim"],
    mask: Bool[Array, "batch_or_1 1 queries keys"],
) -> Float[Array, "batch queries heads dim"]:
    """softmax(query key^T / sqrt(dim)) value, each group of heads sharing one key-value head.

    Scores and softmax are float32. `mask` marks the keys that a query may look at; a query that may look at
    none (padding) gets a finite value that nothing reads.
    """
    batch, queries, heads, dim = query.shape
    kv_heads = key.shape[1]
    # Products in the order of axes that matrix multiplication has: in another, XLA's CPU code is many times slower.
    grouped = query.reshape(batch, queries, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)
    scores = jnp.einsum("bkgqd,bktd->bkgqt", grouped, key, preferred_element_type=wide(query.dtype))
    scores = jnp.where(mask[:, :, None], scores / math.sqrt(dim), jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("bkgqt,bktd->bkgqd", weights, value)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, dim)
