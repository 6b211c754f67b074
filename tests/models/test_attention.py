"""Every implementation of attention computes the same, and one that cannot run is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clara_jax.errors import UserError
from clara_jax.models.attention import attend, attend_splash, check_attention
from tests.models.tiny import tiny_config


def test_attention_has_the_gradient_of_its_formula():
    """Its backward pass is written by hand: a term left out would train every adapter the wrong way."""
    batch, length, heads, kv_heads, dim = 2, 6, 4, 2, 8
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(1), 4)
        arguments = tuple(
            jax.random.normal(key, shape, jnp.float64)
            for key, shape in zip(
                keys,
                [(batch, length, heads, dim), *[(batch, kv_heads, length, dim)] * 2],
                strict=False,
            )
        )
        valid = jnp.arange(length)[None] >= jnp.array([[0], [2]])  # the second row is padded on the left
        mask = jnp.tril(jnp.ones((length, length), bool)) & valid[:, None, None, :]
        wanted = jax.random.normal(keys[3], arguments[0].shape, jnp.float64) * valid[:, :, None, None]

        def formula(query, key, value):
            key, value = (jnp.repeat(x, heads // kv_heads, axis=1) for x in (key, value))
            scores = jnp.einsum("bqhd,bhtd->bhqt", query, key) / dim**0.5
            return jnp.einsum("bhqt,bhtd->bqhd", jax.nn.softmax(jnp.where(mask, scores, -1e300)), value)

        gradients = [
            jax.jit(jax.grad(lambda *a, f=f: jnp.sum(f(*a) * wanted), (0, 1, 2)))(*arguments)
            for f in (formula, lambda *a: attend(*a, mask))
        ]
    for expected, found in zip(*gradients, strict=True):
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, expected, atol=1e-12)  # float64, sums of a few terms


@pytest.mark.parametrize("window", [0, 50])
def test_splash_attention_computes_what_plain_attention_does(window: int):
    """If this broke, a run on a TPU would train another model than one on a GPU."""
    batch, length, heads, kv_heads, dim = 2, 150, 4, 2, 128
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (batch, length, heads, dim))
    key, value = (jax.random.normal(k, (batch, kv_heads, length, dim)) for k in keys[1:])
    valid = jnp.arange(length)[None] < jnp.array([[length], [70]])
    distance = jnp.arange(length)[:, None] - jnp.arange(length)[None]
    mask = (distance >= 0) & ((distance < window) if window else True) & valid[:, None, None, :]

    def splash(q, k, v):
        return attend_splash(q, k, v, valid, window, interpret=True)

    def plain(q, k, v):
        return attend(q, k, v, mask)

    def real(x):
        return jnp.where(valid[:, :, None, None], x, 0)

    with jax.default_matmul_precision("highest"):
        for wanted in range(4):  # the values, then the gradient of each argument
            found = [
                real(f(query, key, value))
                if wanted == 3
                else jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(real(f(*a)))), wanted)(query, key, value)
                for f in (splash, plain)
            ]
            # Softmax by blocks, in float32: the order of sums differs.
            np.testing.assert_allclose(found[0], found[1], atol=2e-5)


@pytest.mark.parametrize(
    ("name", "change", "dtype", "platform", "said"),
    [
        ("cudnn", {}, "bfloat16", "cpu", "needs an NVIDIA GPU"),
        ("cudnn", {}, "float32", "gpu", "16-bit"),
        ("splash", {}, "bfloat16", "gpu", "needs a TPU"),
        ("splash", {"head_dim": 64}, "bfloat16", "tpu", "64 dimensions"),
        ("splash", {"head_dim": 128, "windows": (0, 8)}, "bfloat16", "tpu", "different attention windows"),
    ],
)
def test_an_implementation_that_cannot_run_is_refused(name, change, dtype, platform, said):
    """A silent fallback would be slow, and nobody would know why."""
    config = dataclasses.replace(tiny_config(), **change)
    with pytest.raises(UserError, match=said):
        check_attention(name, config, dtype, platform)
