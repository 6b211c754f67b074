"""The number type of norms, softmax and losses: float32, whatever the compute type (float64 stays float64)."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array


def wide(dtype: Any) -> Any:
    """float32 for bfloat16 and float32 inputs, float64 for float64 ones."""
    return jnp.promote_types(dtype, jnp.float32)


def widen(x: Array) -> Array:
    """`x` in at least float32."""
    return x.astype(wide(x.dtype))
