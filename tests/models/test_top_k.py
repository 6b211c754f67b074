"""The differentiable top-k: an exact sort forward, the straight-through gradient backward.

If these fail, retrieval hands the generator the wrong memories, or the answer's loss teaches the query
reasoner something else than the paper's Algorithm 1 says.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clara_jax.models.top_k import LOG_TAKEN, select_top_k

BATCH, CANDIDATES, MEMORY, HIDDEN = 2, 4, 2, 3
# sequential, sequential with exact_mask, gumbel, gumbel with its noise in the forward
ESTIMATORS = [
    ("sequential", False, False),
    ("sequential", True, False),
    ("gumbel", False, False),
    ("gumbel", False, True),
]
KEY = jax.random.key(7)


def draw_inputs(seed: int, ties: bool, spread: float, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(BATCH, CANDIDATES)) * spread
    if ties:
        scores = np.round(scores * 2 / spread) * spread / 2 + 0.0  # a handful of values: most rows hold equal ones
    memories = rng.normal(size=(BATCH, CANDIDATES, MEMORY, HIDDEN))
    return jnp.asarray(scores, jnp.float32), jnp.asarray(memories, dtype)


def draw_cotangent(seed: int, k: int):
    values = np.random.default_rng(seed + 1).normal(size=(BATCH, k, MEMORY, HIDDEN))
    return jnp.asarray(values, jnp.bfloat16).astype(jnp.float32)  # numbers of both types, for a like comparison


def ours(scores, memories, cotangent, temperature, estimator, exact_mask, in_forward):
    """Gradients of <selected, cotangent> by the custom rule, and the indices."""
    k, rng = cotangent.shape[1], KEY if estimator == "gumbel" else None

    def select(scores, memories):
        return select_top_k(
            scores, memories, k, temperature, estimator, rng, exact_mask=exact_mask, noise_in_forward=in_forward
        )

    _, pull, indices = jax.vjp(select, scores, memories, has_aux=True)
    return *(np.asarray(g) for g in pull(cotangent.astype(memories.dtype))), np.asarray(indices)


def formula(scores, memories, cotangent, temperature, estimator, exact_mask, in_forward):
    """The straight-through formula written out and differentiated by PyTorch's autograd in float64.

    W = hard + soft - stop_gradient(soft), selected = W memories.
    """
    noise = np.asarray(jax.random.gumbel(KEY, scores.shape, jnp.float32)) if estimator == "gumbel" else 0.0
    ranked_by = np.asarray(scores) + noise if in_forward else np.asarray(scores)
    order = np.argsort(-ranked_by, axis=1, kind="stable")[:, : cotangent.shape[1]]
    s = torch.tensor(np.asarray(scores, np.float64), requires_grad=True)
    m = torch.tensor(np.asarray(memories, np.float64), requires_grad=True)
    taken, weights = torch.zeros(s.shape, dtype=torch.bool), []
    for slot in range(cotangent.shape[1]):
        hard = torch.nn.functional.one_hot(torch.tensor(order[:, slot]), s.shape[1])
        logits = (s + torch.tensor(noise)) / temperature
        if estimator == "sequential":
            logits = logits.masked_fill(taken, -torch.inf) if exact_mask else logits + taken * LOG_TAKEN
        soft = torch.softmax(logits, dim=1)
        weights.append(hard + soft - soft.detach())
        taken = taken | (hard > 0)
    selected = torch.einsum("bkn,bnmh->bkmh", torch.stack(weights, dim=1), m)
    (selected * torch.tensor(np.asarray(cotangent, np.float64))).sum().backward()
    return s.grad.numpy(), m.grad.numpy(), order


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), k=st.integers(1, CANDIDATES), ties=st.booleans(), bfloat16=st.booleans())
def test_forward_is_a_stable_sort(seed, k, ties, bfloat16):
    """Users would get other memories, or ties in an order that differs between runs and from the search."""
    scores, memories = draw_inputs(seed, ties, 1.0, jnp.bfloat16 if bfloat16 else jnp.float32)
    selected, indices = select_top_k(scores, memories, k)
    expected = np.argsort(-np.asarray(scores), axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(indices, expected)
    # Bit for bit: the selected memories are copies, not sums with rounding.
    picked = np.take_along_axis(np.asarray(memories), expected[:, :, None, None], axis=1)
    assert selected.dtype == memories.dtype
    np.testing.assert_array_equal(np.asarray(selected), picked)


@pytest.mark.parametrize("method", ESTIMATORS)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    k=st.integers(1, CANDIDATES),
    ties=st.booleans(),
    temperature=st.floats(0.02, 1.0),
    spread=st.sampled_from([0.05, 1.0]),  # gaps like those of cosines, and gaps that outweigh LOG_TAKEN
    bfloat16=st.booleans(),
)
def test_backward_is_the_straight_through_formula(method, seed, k, ties, temperature, spread, bfloat16):
    """The query reasoner (scores) and an unfrozen compressor (memories) would learn from another gradient."""
    # Every k and type is compiled once per operation: one k is enough for bfloat16.
    scores, memories = draw_inputs(seed, ties, spread, jnp.bfloat16 if bfloat16 and k == 2 else jnp.float32)
    cotangent = draw_cotangent(seed, k)
    to_scores, to_memories, indices = ours(scores, memories, cotangent, temperature, *method)
    expected_scores, expected_memories, order = formula(scores, memories, cotangent, temperature, *method)
    np.testing.assert_array_equal(indices, order)
    assert to_scores.dtype == np.float32
    assert to_memories.dtype == memories.dtype
    # A slot's softmax has logits of up to (3 spread + noise 6) / T; their float32 rounding (6e-8 each) moves its
    # weights by that share, and the result is a difference of terms of |cotangent| |memory| / T, 10 / T at most.
    # With bfloat16 memories the products <g, M> are exact in float32 as well, so nothing is looser there.
    largest = (3 * spread + (6 if method[0] == "gumbel" else 0)) / temperature + 20
    np.testing.assert_allclose(to_scores, expected_scores, rtol=0, atol=largest * 6e-8 * k * 10 / temperature)
    # The selected memories' cotangents are copied, never computed: W is one-hot.
    np.testing.assert_allclose(to_memories.astype(np.float64), expected_memories, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ESTIMATORS)
@pytest.mark.parametrize("existing", [3, 1, 0])
def test_absent_candidates_give_no_nan(method, existing):
    """One question with fewer documents than its batch would turn every weight of the model into NaN."""
    scores, memories = draw_inputs(3, False, 1.0)
    scores = scores.at[0, existing:].set(-jnp.inf)
    to_scores, to_memories, indices = ours(scores, memories, draw_cotangent(3, 3), 0.02, *method)
    assert np.isfinite(to_scores).all()
    assert np.isfinite(to_memories).all()
    np.testing.assert_array_equal(to_scores[0, existing:], 0.0)  # what does not exist cannot be taught
    assert set(indices[0, :existing]) == set(range(existing))  # what exists comes first


def test_bfloat16_scores():
    """A caller whose scores are bfloat16 would get a gradient of another type, or none."""
    scores, memories = draw_inputs(5, False, 1.0, jnp.bfloat16)
    rounded, cotangent = scores.astype(jnp.bfloat16), draw_cotangent(5, 2)
    to_scores, _, _ = ours(rounded, memories, cotangent, 0.5, "sequential", False, False)
    expected, _, _ = formula(rounded, memories, cotangent, 0.5, "sequential", False, False)
    assert to_scores.dtype == jnp.bfloat16
    # Computed in float32 and rounded once: half a unit in the last of 8 bits.
    np.testing.assert_allclose(to_scores.astype(np.float64), expected, rtol=2**-8, atol=1e-5)


def test_zero_and_negative_zero_are_equal():
    """Two scores of zero would be taken out of order where one of them is -0.0, unlike in a stable sort."""
    _, memories = draw_inputs(0, False, 1.0)
    scores = jnp.asarray([[-0.0, 0.0, -1.0, -0.0], [1.0, -0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(select_top_k(scores, memories, 4)[1], [[0, 1, 3, 2], [0, 1, 2, 3]])


def test_jit_and_vmap_change_nothing():
    """The training step (jit) and a batch of batches (vmap) would get other gradients than eager calls."""
    scores, memories = draw_inputs(1, True, 0.05)

    def loss(scores, memories):
        return jnp.sum(select_top_k(scores, memories, 3)[0] ** 2)

    plain = jax.grad(loss, argnums=(0, 1))(scores, memories)
    mapped = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1))))(scores[:, None], memories[:, None])
    for one, other in zip(plain, mapped, strict=True):
        # Other compilations order sums of a few terms otherwise: some float32 roundings of the largest entry.
        np.testing.assert_allclose(other[:, 0], one, rtol=0, atol=1e-5 * float(jnp.abs(one).max()))


def test_only_the_products_the_gradient_needs():
    """A [k, N] x [N, m h] product would cost more than the selection: N = 20 candidates of 8 x 4096 numbers."""
    scores, memories = draw_inputs(0, False, 1.0)

    def selected(scores, memories):
        return select_top_k(scores, memories, 2)[0]

    forward = jax.make_jaxpr(selected)(scores, memories)
    assert len(products(forward.jaxpr)) == 0
    _, pull = jax.vjp(selected, scores, memories)
    backward = jax.make_jaxpr(pull)(jnp.ones((BATCH, 2, MEMORY, HIDDEN)))
    # [B, k, m h] x [B, N, m h] -> [B, k, N]: the inner products <g_j, M_n>, contracted over m and h.
    assert products(backward.jaxpr) == [(BATCH, 2, CANDIDATES)] or products(backward.jaxpr) == [(BATCH, CANDIDATES, 2)]


def products(jaxpr) -> list[tuple[int, ...]]:
    """Shapes of the results of all matrix products, inner programs included."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(equation.outvars[0].aval.shape)
        for inner in jax.core.jaxprs_in_params(equation.params):
            found += products(inner)
    return found


@pytest.mark.parametrize("k", [0, -1, CANDIDATES + 1])
def test_k_out_of_range(k):
    """More memories than there are candidates would silently repeat or drop memories."""
    scores, memories = draw_inputs(0, False, 1.0)
    with pytest.raises(ValueError, match=rf"k is {k} for {CANDIDATES} candidates"):
        select_top_k(scores, memories, k)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_must_be_positive(temperature):
    """A zero temperature would divide by zero in the first backward pass."""
    scores, memories = draw_inputs(0, False, 1.0)
    with pytest.raises(ValueError, match="temperature"):
        select_top_k(scores, memories, 1, temperature)


def test_gumbel_needs_rng():
    """Without noise the gumbel estimator would quietly be another estimator."""
    scores, memories = draw_inputs(0, False, 1.0)
    with pytest.raises(ValueError, match="rng"):
        select_top_k(scores, memories, 1, 0.1, "gumbel")


def test_gumbel_noise_moves_the_selection_only_if_asked():
    """Users who train with gumbel would see retrieval change at random, or noise_in_forward do nothing."""
    scores, memories = draw_inputs(0, False, 0.01)
    keys = jax.random.split(jax.random.key(0), 8)

    def picks(in_forward):
        def select(key):
            return select_top_k(scores, memories, 2, 0.1, "gumbel", key, noise_in_forward=in_forward)[1]

        return np.asarray(jax.vmap(select)(keys))

    quiet = np.argsort(-np.asarray(scores), axis=1, kind="stable")[:, :2]
    assert (picks(False) == quiet).all()
    assert (picks(True) != quiet).any()
