"""The number type of norms, softmax, logits and losses: float32, whatever the compute type (float64 stays float64)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float


def wide(dtype: Any) -> Any:
    """float32 for bfloat16 and float32 inputs, float64 for float64 ones."""
    return jnp.promote_types(dtype, jnp.float32)


def widen(x: Array) -> Array:
    """`x` in at least float32."""
    return x.astype(wide(x.dtype))


def of_products(dtype: Any) -> jax.lax.Precision | None:
    """The precision of products: full for float32, which accelerators otherwise round."""
    return None if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST


@jax.custom_jvp
def wide_product(x: Float[Array, "*rows inner"], weights: Float[Array, "inner outer"]) -> Float[Array, "*rows outer"]:
    """X @ weights with the result in at least float32; gradients are multiplied in the type of the factors.

    A result wider than its factors has a gradient wider than them: without this, the backward pass would widen the
    weights to it, and multiply at a fraction of the speed.
    """
    return _multiply(x, weights, wide(x.dtype))


@functools.partial(wide_product.defjvp, symbolic_zeros=True)
def _wide_product_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
    (x, weights), (x_tangent, weights_tangent) = primals, tangents
    result = wide_product(x, weights)
    parts = [(x_tangent, weights), (x, weights_tangent)]
    known = [part for part in parts if not any(isinstance(factor, SymbolicZero) for factor in part)]
    first, *others = (_multiply(left, right, x.dtype) for left, right in known)
    return result, sum(others, start=first).astype(result.dtype)


def _multiply(left: Array, right: Array, dtype: Any) -> Array:
    return jnp.matmul(left, right, precision=of_products(left.dtype), preferred_element_type=dtype)
