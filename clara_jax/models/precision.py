"""The number type of norms, softmax, logits and losses: float32, whatever the compute type (float64 stays float64)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def wide(dtype: Any) -> Any:
    """float32 for bfloat16 and float32 inputs, float64 for float64 ones."""
    return jnp.promote_types(dtype, jnp.float32)


def widen(x: Array) -> Array:
    """`x` in at least float32."""
    return x.astype(wide(x.dtype))


@jax.custom_vjp
def wide_product(x: Float[Array, "*rows inner"], weights: Float[Array, "inner outer"]) -> Float[Array, "*rows outer"]:
    """X @ weights with the result in at least float32; gradients are multiplied in the type of the factors.

    A result wider than its factors has a gradient wider than them: without this, the backward pass would widen the
    weights to it, and multiply at a fraction of the speed.
    """
    return _multiply(x, weights, wide(x.dtype))


def _forward(x: Array, weights: Array) -> tuple[Array, tuple[Array, Array]]:
    return wide_product(x, weights), (x, weights)


def _backward(factors: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, weights = factors
    gradient = gradient.astype(x.dtype)
    rows = _multiply(x.reshape(-1, x.shape[-1]).T, gradient.reshape(-1, gradient.shape[-1]), weights.dtype)
    return _multiply(gradient, weights.T, x.dtype), rows


def _multiply(left: Array, right: Array, dtype: Any) -> Array:
    precision = None if left.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    return jnp.matmul(left, right, precision=precision, preferred_element_type=dtype)


wide_product.defvjp(_forward, _backward)
