"""Low-rank adapters: what they add, what they leave alone, and that they are plain pytrees under every transform."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clara_jax.errors import UserError
from clara_jax.models.decoder import Decoder
from clara_jax.models.lora import LoraConfig, adapter_shapes, draw_kept, init_adapter, multiply_wide
from tests.models.tiny import jit, random_adapter, random_base, random_embeddings, tiny_config

RANK, ALPHA = 3, 7.0
X = random_embeddings(2, 5)
VALID = jnp.ones((2, 5), bool)
# Sums of some tens of float32 terms in another order, over two layers: below 1e-5 of entries of size one.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


@functools.cache
def setting(dropout: float = 0.0, fused: bool = False):
    config = tiny_config(family="phi3", fused_projections=True) if fused else tiny_config()
    decoder = Decoder(config, jnp.float32, lora_alpha=ALPHA, lora_dropout=dropout)

    @jax.jit  # also called within other compiled functions
    def run(base, adapter, x=X, rng=None):
        variables = {"params": base} if adapter is None else {"params": base, "lora": adapter}
        rngs = {} if rng is None else {"dropout": rng}
        return decoder.apply(variables, x, VALID[: x.shape[0]], rngs=rngs)[0]

    return decoder, random_base(decoder), random_adapter(config, RANK), run


@functools.cache
def loss_and_gradient():
    """Of a smooth loss of the adapter, compiled once."""
    _, base, _, run = setting()
    return jax.jit(jax.value_and_grad(lambda adapter, x: jnp.sum(jnp.sin(run(base, adapter, x)))))


def test_fresh_adapter_changes_nothing():
    """Training would start from a damaged base model instead of the base model itself."""
    decoder, base, _, run = setting()
    fresh = jit(lambda key: init_adapter(key, decoder.config, RANK))(jax.random.key(0))
    np.testing.assert_array_equal(run(base, fresh), run(base, None))
    # Yet it can learn: every A matrix is random, within PEFT's bounds, and no two are alike.
    matrices = [leaf["a"] for leaf in fresh["layers"].values()]
    for matrix in matrices:
        bound = 1 / np.sqrt(matrix.shape[1])
        assert float(jnp.abs(matrix).max()) <= bound
        assert float(matrix.std()) == pytest.approx(bound / np.sqrt(3), rel=0.3)  # 96 draws or more: 3 spreads
        assert not np.allclose(matrix[0], matrix[1])
    assert len({float(matrix[0, 0, 0]) for matrix in matrices}) == len(matrices)


def test_adapter_is_a_dense_update_of_each_projection():
    """A scale other than alpha / rank, or an adapter on the wrong projection, gives another model than PEFT's."""
    _, base, adapter, run = setting()
    layers = dict(base["layers"])
    for name, leaf in adapter["layers"].items():
        update = ALPHA / RANK * jnp.einsum("lir,lro->lio", leaf["a"], leaf["b"], precision="highest")
        layers[name] = {"kernel": layers[name]["kernel"] + update}
    np.testing.assert_allclose(run(base, adapter), run(base | {"layers": layers}, None), **ROUNDING)


def test_fused_adapter_is_a_dense_update_cut_into_q_k_v():
    """Published Phi-3 adapters would be applied to the wrong rows of q, k, v, gate and up."""
    _, base, adapter, run = setting(fused=True)
    widths = {"q_proj": 16, "k_proj": 8, "v_proj": 8, "o_proj": 16, "gate_proj": 24, "up_proj": 24, "down_proj": 16}
    sites = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "o_proj": ("o_proj",),
        "gate_up_proj": ("gate_proj", "up_proj"),
        "down_proj": ("down_proj",),
    }
    layers = dict(base["layers"])
    for site, targets in sites.items():
        a, b = adapter["layers"][site]["a"], adapter["layers"][site]["b"]
        update = ALPHA / RANK * jnp.einsum("lir,lro->lio", a, b, precision="highest")
        start = 0
        for name in targets:
            part = update[:, :, start : start + widths[name]]
            layers[name] = {"kernel": layers[name]["kernel"] + part}
            start += widths[name]
        assert start == update.shape[-1]
    assert set(adapter["layers"]) == set(sites)
    np.testing.assert_allclose(run(base, adapter), run(base | {"layers": layers}, None), **ROUNDING)


def test_vmap_over_a_batch_of_adapters():
    """Comparing or serving several adapters on one base in one call would mix them up."""
    decoder, base, first, run = setting()
    second = random_adapter(decoder.config, RANK, seed=9)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
    mapped = jax.vmap(run, in_axes=(None, 0))(base, stacked)
    np.testing.assert_allclose(mapped[0], run(base, first), **ROUNDING)
    np.testing.assert_allclose(mapped[1], run(base, second), **ROUNDING)
    assert not np.allclose(mapped[0], mapped[1], atol=0.01)


def test_scan_of_optimizer_steps():
    """Gradient accumulation and multi-step loops are scans that carry the adapter: its tree must not change."""
    adapter = setting()[2]

    def step(adapter, x):
        loss, gradient = loss_and_gradient()(adapter, x)
        return jax.tree.map(lambda p, g: p - 0.01 * g, adapter, gradient), loss

    inputs = jnp.stack([X, X + 0.1])
    scanned, losses = jit(lambda a: jax.lax.scan(step, a, inputs))(adapter)
    looped = adapter
    for number in range(2):
        looped, loss = step(looped, inputs[number])
        # Rounding of the first step, magnified by the second: 1e-5 of sums of 160 terms of size one.
        assert float(loss) == pytest.approx(float(losses[number]), abs=1e-3)
    for got, expected in zip(jax.tree.leaves(scanned), jax.tree.leaves(looped), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


def test_gradient_reaches_every_adapter_leaf_and_nothing_else():
    """A site left out of training, or a base that trains, would go unnoticed in the loss."""
    _, base, adapter, run = setting()
    _, gradient = loss_and_gradient()(adapter, X)
    assert jax.tree.structure(gradient) == jax.tree.structure(adapter)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        # Both layers: a layer axis dropped or shared would leave a zero.
        assert (jnp.abs(leaf).max(axis=(1, 2)) > 1e-6).all(), jax.tree_util.keystr(path)
    # Against a finite difference along a random direction.
    direction = random_adapter(tiny_config(), RANK, seed=5)
    shift = 1e-3

    def along(step):
        moved = jax.tree.map(lambda p, d: p + step * d, adapter, direction)
        return float(jnp.sum(jnp.sin(run(base, moved))))

    slope = (along(shift) - along(-shift)) / (2 * shift)
    expected = sum(
        float(jnp.vdot(g, d)) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
    )
    # The difference's own error: shift^2 x third derivative (0.3 %), and rounding 1e-5 / shift.
    assert slope == pytest.approx(expected, rel=2e-2)


def test_dropout_only_with_an_rng_and_the_same_for_the_same_rng():
    """Evaluation would be noisy, or two runs with one seed would differ."""
    _, base, adapter, run = setting(dropout=0.4)
    plain = setting()[3]
    np.testing.assert_array_equal(run(base, adapter), plain(base, adapter))
    one, two = (jax.random.key(seed, impl="unsafe_rbg") for seed in (1, 2))  # quick to compile
    first = run(base, adapter, X, one)
    np.testing.assert_array_equal(first, run(base, adapter, X, one))
    assert not np.allclose(first, run(base, adapter, X, two), atol=1e-3)
    assert not np.allclose(first, run(base, adapter), atol=1e-3)
    # With dropout 0 an rng changes nothing.
    np.testing.assert_array_equal(plain(base, adapter, X, one), plain(base, adapter))


def adapter_inputs_after_dropout(layer: int, dropout: float, rows: int) -> np.ndarray:
    """What `layer`'s adapter of v_proj makes of an input of ones, times rank / alpha: [rows, 15].

    Everything else in the network is the identity or zero, so the adapter's input can be read from the output:
    one column per row makes attention pass v_proj's output on, A and B are the identity (but for feature 0, which
    the adapter leaves at 1, so that the final norm's divisor is known).
    """
    config = tiny_config(num_kv_heads=2)
    decoder = Decoder(config, jnp.float32, lora_alpha=4.0, lora_dropout=dropout)
    base = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), decoder.abstract_base())
    for name in ("attention_norm", "mlp_norm"):
        base["layers"][name] += 1
    base["final_norm"] += 1
    base["layers"]["o_proj"]["kernel"] += np.eye(16)
    adapter = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), adapter_shapes(config, 16))
    adapter["layers"]["v_proj"]["a"][layer] = np.diag([0] + [1] * 15)
    adapter["layers"]["v_proj"]["b"][layer] = np.eye(16)
    variables, rngs = {"params": base, "lora": adapter}, {"dropout": jax.random.key(3)}
    out = jit(decoder.apply)(variables, jnp.ones((rows, 1, 16)), jnp.ones((rows, 1), bool), rngs=rngs)[0]
    return (np.asarray(out[:, 0, 1:] / out[:, 0, :1]) - 1) * 16 / 4


def test_dropout_scales_what_it_keeps():
    """A missing 1 / (1 - p) would shrink the update in training, and evaluation would meet another model."""
    seen = adapter_inputs_after_dropout(layer=0, dropout=0.4, rows=400)
    kept = seen > 0.5
    np.testing.assert_allclose(seen[kept], 1 / 0.6, rtol=1e-4)  # eps of the norm, and 1 + u - 1 in float32
    np.testing.assert_allclose(seen[~kept], 0, atol=1e-5)
    # 6000 draws: a spread of sqrt(0.4 x 0.6 / 6000) = 0.0063, of which five.
    assert kept.mean() == pytest.approx(0.6, abs=0.032)
    # Every row (token) and every feature has a mask of its own.
    assert 0 < kept.mean(axis=0).min() < kept.mean(axis=0).max() < 1
    assert len(np.unique(kept, axis=0)) > 300


def test_dropout_is_as_good_as_random():
    """A hash with a pattern would drop the same inputs of several rows, or neighbours together."""
    rows, shape, share = jnp.arange(16), (200, 256), 0.9
    kept = np.stack([np.asarray(draw_kept(jax.random.key(n), rows, share, shape)) for n in range(4)])
    kept = kept.reshape(64, -1).astype(float)
    number, spread = kept.shape[1], np.sqrt(share * (1 - share))
    # All in standard deviations; the bounds are those that a million random draws would not pass.
    assert np.abs(kept.mean(1) - share).max() * np.sqrt(number) / spread < 5
    between = np.corrcoef(kept)[np.triu_indices(64, 1)] * np.sqrt(number)
    assert np.abs(between).max() < 5.5
    off = kept - share
    for lag in (1, 2, 8, 128, 256, 512, 1024):  # along the row of features, and from column to column
        together = (off[:, lag:] * off[:, :-lag]).mean(1) * np.sqrt(number) / spread**2
        assert np.abs(together).max() < 5.5
        assert np.abs(together.mean()) * 8 < 5


def test_the_wide_product_has_its_gradients():
    """They are written by hand: B of every adapter learns by them."""
    keys = jax.random.split(jax.random.key(2), 3)
    narrow, b, wanted = (
        jax.random.normal(k, shape) for k, shape in zip(keys, [(2, 5, 3), (3, 7), (2, 5, 7)], strict=True)
    )
    gradients = [
        jax.grad(lambda *a, f=f: jnp.sum(f(*a) * wanted), (0, 1))(narrow, b)
        for f in (multiply_wide, lambda x, y: jnp.matmul(x, y, precision="highest"))
    ]
    for found, expected in zip(*gradients, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)  # the order of ten sums


def test_dropout_differs_between_layers():
    """One mask for all layers (a scan without split rngs) is another regulariser than the reference's."""
    first, second = (adapter_inputs_after_dropout(layer, dropout=0.5, rows=50) > 0.5 for layer in range(2))
    # 750 fair bits agree in half of the places: a spread of 0.018, of which five.
    assert (first == second).mean() == pytest.approx(0.5, abs=0.09)


@pytest.mark.parametrize(
    ("fields", "key"),
    [({"rank": 0}, "lora.rank"), ({"dropout": 1.0}, "lora.dropout"), ({"dropout": -0.1}, "lora.dropout")],
)
def test_bad_settings_are_named(fields, key):
    """Dropout 1 would divide by zero in the first step, rank 0 train nothing."""
    with pytest.raises(UserError, match=key):
        LoraConfig(**fields)
