"""Differentiable top-k (paper, Algorithm 1): exact selection forward, straight-through gradient backward.

Slot j of the forward pass holds the j-th best memory, untouched. The backward pass behaves as if slot j
were a mixture of all memories under a softmax of the scores, so that the loss tells the scores which
memory would have helped: with g_j the cotangent of slot j, the mixture weight of memory n receives
<g_j, M_n>, pulled back through the slot's softmax. No one-hot matrix and no [k, N] x [N, m h] product is
built in either direction.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from clara_jax.models.precision import wide, widen

Estimator = Literal["sequential", "gumbel"]

# How far the reference lowers a memory that an earlier slot has taken: log(1e-8). It is finite, so a taken
# memory whose scaled score leads by more than 18.4 keeps most of a later slot's mass.
LOG_TAKEN = -18.420680743952367


class TopK(NamedTuple):
    """How memories are selected.

    `estimator`: `sequential` is the paper's (slot j's softmax has earlier picks lowered); `gumbel` uses one
    distribution softmax((scores + Gumbel noise) / temperature) for all slots. `exact_mask` removes earlier
    picks wholly (sequential). `noise_in_forward` selects by the noisy scores too (gumbel).
    """

    k: int
    temperature: float = 0.02
    estimator: Estimator = "sequential"
    exact_mask: bool = False
    noise_in_forward: bool = False


def select_top_k(
    scores: Float[Array, "batch candidates"],
    memories: Float[Array, "batch candidates memory hidden"],
    k: int,
    temperature: float = 0.02,
    estimator: Estimator = "sequential",
    rng: PRNGKeyArray | Key[Array, " batch"] | None = None,
    *,
    exact_mask: bool = False,
    noise_in_forward: bool = False,
) -> tuple[Float[Array, "batch k memory hidden"], Int[Array, "batch k"]]:
    """The k best memories of each row, best first, and their indices.

    Equal scores are taken in order of index. A candidate that does not exist has the score -inf. `rng` is
    needed by the gumbel estimator only: one key, or one for each row. Raises `ValueError` for k outside 1..N, a
    temperature that is not positive, or gumbel without `rng`.
    """
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k is {k} for {scores.shape[1]} candidates; choose 1 <= k <= candidates")
    if estimator not in SLOT_DISTRIBUTIONS:
        raise ValueError(f"estimator is {estimator!r}; choose one of {', '.join(SLOT_DISTRIBUTIONS)}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; choose a positive one")
    if estimator == "gumbel":
        if rng is None:
            raise ValueError("the gumbel estimator draws noise; pass rng")
        noise = _gumbel_noise(rng, scores)
    else:
        noise = jnp.zeros_like(scores)
    return _select(TopK(k, temperature, estimator, exact_mask, noise_in_forward), scores, memories, noise)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _select(how: TopK, scores: Array, memories: Array, noise: Array) -> tuple[Array, Array]:
    ranked_by = scores + noise if how.noise_in_forward else scores
    ranked_by = jnp.where(ranked_by == 0, 0.0, ranked_by)  # lax.top_k puts 0.0 before -0.0
    indices = jax.lax.top_k(ranked_by, how.k)[1]
    return jnp.take_along_axis(memories, indices[:, :, None, None], axis=1), indices


def _select_forward(how: TopK, scores: Array, memories: Array, noise: Array) -> tuple[Any, Any]:
    selected, indices = _select(how, scores, memories, noise)
    return (selected, indices), (scores, memories, noise, indices)


def _select_backward(how: TopK, residuals: Any, cotangents: Any) -> tuple[Array, Array, None]:
    scores, memories, noise, indices = residuals
    slots = cotangents[0]
    weights = jnp.einsum("bkmh,bnmh->bkn", slots, memories, preferred_element_type=wide(slots.dtype))
    soft = SLOT_DISTRIBUTIONS[how.estimator](how, widen(scores), noise, indices)
    centred = weights - jnp.sum(soft * weights, axis=-1, keepdims=True)
    to_scores = jnp.sum(soft * centred, axis=1) / how.temperature
    rows = jnp.arange(indices.shape[0])[:, None]
    to_memories = jnp.zeros_like(memories).at[rows, indices].add(slots.astype(memories.dtype))
    return to_scores.astype(scores.dtype), to_memories, None


_select.defvjp(_select_forward, _select_backward)


def _gumbel_noise(rng: Array, scores: Array) -> Array:
    if rng.ndim == 0:
        return jax.random.gumbel(rng, scores.shape, wide(scores.dtype))
    return jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[1:], wide(scores.dtype)))(rng)


def _sequential(how: TopK, scores: Array, noise: Array, indices: Array) -> Array:
    picks = jax.nn.one_hot(indices, scores.shape[-1], dtype=jnp.bool_)
    taken = jnp.cumsum(picks, axis=1) - picks > 0
    lowered = -jnp.inf if how.exact_mask else LOG_TAKEN
    return _softmax(scores[:, None, :] / how.temperature + jnp.where(taken, lowered, 0.0))


def _gumbel(how: TopK, scores: Array, noise: Array, indices: Array) -> Array:
    return _softmax((scores + noise) / how.temperature)[:, None, :]


def _softmax(logits: Array) -> Array:
    some_left = jnp.max(logits, axis=-1, keepdims=True) > -jnp.inf  # else the slot teaches nothing
    return jnp.where(some_left, jax.nn.softmax(logits, axis=-1), 0.0)


# Each estimator is a function from scores to the slots' distributions, [batch, k or 1, candidates].
SLOT_DISTRIBUTIONS: dict[Estimator, Callable[[TopK, Array, Array, Array], Array]] = {
    "sequential": _sequential,
    "gumbel": _gumbel,
}
