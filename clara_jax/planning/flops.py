"""Floating-point operations of a traced program: its matrix products, loops counted as often as they turn."""

import math
from typing import Any

from jax.extend import core


def program_flops(jaxpr: core.ClosedJaxpr) -> float:
    """Operations of all matrix products in one run on all devices together; a product [a, b] x [b, c] is 2abc.

    What a backward pass computes again is counted, for the hardware computes it. Of a conditional the costliest branch
    counts. Raises `ValueError` for a product inside a loop whose number of turns is not known.
    """
    return _flops(jaxpr.jaxpr)


def _flops(jaxpr: Any) -> float:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    if name.startswith("dot_product_attention_"):  # cuDNN's
        return _fused_attention(equation)
    inner = [_flops(body) for value in params.values() for body in _bodies(value)]
    if not any(inner):
        return 0.0
    if name == "while":
        raise ValueError("a matrix product in a loop whose number of turns is not known")
    if name == "cond":
        return max(inner)
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"]) * sum(inner)
    return sum(inner)


def _fused_attention(equation: Any) -> float:
    """Two products forward; backward the scores once more, and a gradient for each factor of both."""
    batch, queries, heads, dim = equation.invars[0].aval.shape
    keys = equation.invars[1].aval.shape[1]
    products = 5 if "bwd" in equation.primitive.name else 2
    return products * 2.0 * batch * heads * queries * keys * dim


def _bodies(value: Any) -> list[Any]:
    values = value if isinstance(value, tuple | list) else [value]
    return [getattr(v, "jaxpr", v) for v in values if isinstance(v, core.ClosedJaxpr | core.Jaxpr)]
