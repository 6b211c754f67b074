"""Rotary position embedding with the scalings of the supported families."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from clara_jax.models.config import Rope
from clara_jax.models.precision import widen


def rotary_tables(
    rope: Rope, positions: Int[Array, "batch seq"], lengths: Int[Array, " batch"]
) -> tuple[Float[Array, "batch seq pairs"], Float[Array, "batch seq pairs"]]:
    """Cosine and sine of every position's angle for each rotary pair, float32.

    `positions` count real tokens (padding does not move them). `lengths` is the number of real tokens
    in each row: dynamic and longrope scaling depend on it past the original length. Hugging Face takes
    the longest row of the batch there; taking each row's own keeps a text's numbers independent of
    what it is batched with. Below the original length both are the same.
    """
    frequencies = _inverse_frequencies(rope, lengths)
    angles = positions[..., None].astype(frequencies.dtype) * frequencies
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def rotate(
    x: Float[Array, "batch seq heads dim"],
    cos: Float[Array, "batch seq pairs"],
    sin: Float[Array, "batch seq pairs"],
) -> Float[Array, "batch seq heads dim"]:
    """Rotate the pairs (i, i + pairs) of each head by their angles; dimensions past 2 x pairs pass."""
    pairs = cos.shape[-1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first, second = widen(x[..., :pairs]), widen(x[..., pairs : 2 * pairs])
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), x[..., 2 * pairs :]], axis=-1)


def _inverse_frequencies(rope: Rope, lengths: Int[Array, " batch"]) -> Float[Array, "rows 1 pairs"]:
    """Angle per position of each pair; `rows` is 1 where it does not depend on the row's length."""
    exponents = np.arange(0, rope.rotary_dim, 2) / rope.rotary_dim
    plain = rope.theta**-exponents
    if rope.type == "linear":
        plain = plain / rope.factor
    elif rope.type == "llama3":
        plain = _llama3(rope, plain)
    elif rope.type == "dynamic":
        longest = jnp.maximum(lengths, rope.original_length).astype(jnp.float32)
        stretch = rope.factor * longest / rope.original_length - (rope.factor - 1)
        theta = rope.theta * stretch ** (rope.rotary_dim / (rope.rotary_dim - 2))
        return (theta[:, None] ** -jnp.asarray(exponents, jnp.float32))[:, None, :]
    elif rope.type == "longrope":
        short = jnp.asarray(plain / np.asarray(rope.short_factors), jnp.float32)
        long = jnp.asarray(plain / np.asarray(rope.long_factors), jnp.float32)
        return jnp.where((lengths > rope.original_length)[:, None, None], long, short)
    return jnp.asarray(plain, jnp.float32)[None, None, :]


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """Llama 3.1: slow frequencies divided by `factor`, fast ones kept, a linear ramp between."""
    rotations = rope.original_length * plain / (2 * math.pi)
    ramp = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = np.clip(ramp, 0.0, 1.0)
    return kept * plain + (1 - kept) * plain / rope.factor
