"""Grouped-query attention, by the implementation that the configuration names.

    xla     plain products and a softmax, on every platform; always used with a key-value cache
    cudnn   NVIDIA's fused kernel (16-bit types)
    splash  the Pallas kernel for TPU: scores are never written to memory, and masked blocks are not computed

None gives way to another: what does not fit is an error (`check_attention`). Each marks its result, and what else its
backward pass reads, as something that `model.remat` may keep.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from clara_jax.errors import fail
from clara_jax.models.config import DecoderConfig
from clara_jax.models.precision import of_products, wide, widen
from clara_jax.models.remat import NAME, keep
from clara_jax.sharding import over_rows_and_heads

AttentionName = Literal["xla", "cudnn", "splash"]
_BLOCK = 128  # columns of a block of splash attention
_EVEN = 8  # cuDNN's lengths are made multiples of


@jax.custom_vjp
def attend(
    query: Float[Array, "batch queries heads dim"],
    key: Float[Array, "batch kv_heads keys dim"],
    value: Float[Array, "batch kv_heads keys dim"],
    mask: Bool[Array, "batch_or_1 1 queries keys"],
) -> Float[Array, "batch queries heads dim"]:
    """softmax(query key^T / sqrt(dim)) value, each group of heads sharing one key-value head.

    Scores and softmax are float32. `mask` marks the keys that a query may look at; a query that may look at
    none (padding) gets a finite value that nothing reads. The backward pass makes the weights again, from each query's
    largest score and the sum of its weights before they are divided by it.
    """
    return _attend_forward(query, key, value, mask)[0]


def _attend_forward(query: Array, key: Array, value: Array, mask: Array) -> tuple[Array, tuple[Array, ...]]:
    grouped = _grouped(query, key)
    scores = _scores(grouped, key, mask)
    largest = keep(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - largest)
    total = keep(jnp.sum(weights, axis=-1, keepdims=True))
    mixed = _product("bkgqt,bktd->bkgqd", (weights / total).astype(value.dtype), value)
    mixed = keep(mixed.transpose(0, 3, 1, 2, 4).reshape(query.shape))
    return mixed, (query, key, value, mask, mixed, largest, total)


def _attend_backward(kept: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array, None]:
    query, key, value, mask, mixed, largest, total = kept
    grouped, gradient, mixed = (_grouped(x, key) for x in (query, gradient, mixed))
    weights = jnp.exp(_scores(grouped, key, mask) - largest) / total
    along = jnp.sum(widen(gradient) * widen(mixed), axis=-1, keepdims=True)
    of_weights = _product("bkgqd,bktd->bkgqt", gradient, value, wide(query.dtype))
    of_scores = (weights * (of_weights - along) / math.sqrt(query.shape[-1])).astype(query.dtype)
    of_query = _product("bkgqt,bktd->bkgqd", of_scores, key).transpose(0, 3, 1, 2, 4).reshape(query.shape)
    # The narrow factor on the left: on the right, XLA's CPU code would turn the scores first.
    of_key = _product("bkgqd,bkgqt->bkdt", grouped, of_scores)
    of_value = _product("bkgqd,bkgqt->bkdt", gradient, weights.astype(value.dtype))
    of_key, of_value = jax.lax.optimization_barrier((of_key, of_value))
    return of_query, jnp.swapaxes(of_key, 2, 3), jnp.swapaxes(of_value, 2, 3), None


attend.defvjp(_attend_forward, _attend_backward)


def _grouped(x: Array, key: Array) -> Array:
    """[batch, kv_heads, group, length, dim]: in another order of axes XLA's CPU code multiplies many times slower."""
    batch, length, heads, dim = x.shape
    kv_heads = key.shape[1]
    return x.reshape(batch, length, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)


def _scores(grouped: Array, key: Array, mask: Array) -> Array:
    scores = _product("bkgqd,bktd->bkgqt", grouped, key, wide(key.dtype))
    return jnp.where(mask[:, :, None], scores / math.sqrt(key.shape[-1]), jnp.finfo(scores.dtype).min)


def _product(axes: str, left: Array, right: Array, dtype: Any = None) -> Array:
    return jnp.einsum(axes, left, right, precision=of_products(left.dtype), preferred_element_type=dtype)


def attend_cudnn(
    query: Float[Array, "batch queries heads dim"],
    key: Float[Array, "batch kv_heads keys dim"],
    value: Float[Array, "batch kv_heads keys dim"],
    mask: Bool[Array, "batch_or_1 1 queries keys"],
) -> Float[Array, "batch queries heads dim"]:
    """As `attend`, by cuDNN, which takes even lengths only: columns that no one looks at fill them up."""

    def of_device(query: Array, key: Array, value: Array, mask: Array) -> Array:
        queries, keys = mask.shape[2:]
        more_queries, more_keys = -queries % _EVEN, -keys % _EVEN
        query = jnp.pad(query, ((0, 0), (0, more_queries), (0, 0), (0, 0)))
        key, value = (jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, more_keys), (0, 0), (0, 0))) for x in (key, value))
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, more_queries), (0, more_keys)))
        mixed = jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")
        return mixed[:, :queries]

    return over_rows_and_heads(of_device, (2, 1, 1, None), 2)(query, key, value, mask)


def attend_splash(
    query: Float[Array, "batch length heads dim"],
    key: Float[Array, "batch kv_heads length dim"],
    value: Float[Array, "batch kv_heads length dim"],
    valid: Bool[Array, "batch length"],
    window: int = 0,
    interpret: bool = False,
) -> Float[Array, "batch length heads dim"]:
    """As `attend` under a causal mask within a `window` (0: none), real tokens apart from padding.

    `interpret` runs the kernel's program step by step on any platform, for tests.
    """
    # Here, for it takes half a second to import.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

    length, dim = query.shape[1], query.shape[3]

    def of_device(query: Array, key: Array, value: Array, valid: Array) -> Array:
        query = jnp.swapaxes(query, 1, 2)
        room = -length % _BLOCK
        query, key, value = (jnp.pad(x, ((0, 0), (0, 0), (0, room), (0, 0))) for x in (query, key, value))
        valid = jnp.pad(valid, ((0, 0), (0, room)))
        shape = (length + room, length + room)
        one = splash_mask.LocalMask(shape, (window - 1, 0), 0) if window else splash_mask.CausalMask(shape)
        heads = splash_mask.MultiHeadMask([one] * query.shape[1])
        kernel = splash.make_splash_mha(
            heads, head_shards=1, q_seq_shards=1, residual_checkpoint_name=NAME, interpret=interpret
        )
        # Padding is a segment of its own: a token looks at tokens of its kind only.
        segments = splash.SegmentIds(valid.astype(jnp.int32), valid.astype(jnp.int32))
        mixed = jax.vmap(kernel)(query / math.sqrt(dim), key, value, segments)
        return jnp.swapaxes(mixed[:, :, :length], 1, 2).astype(query.dtype)

    return over_rows_and_heads(of_device, (2, 1, 1, None), 2)(query, key, value, valid)


def check_attention(name: AttentionName, config: DecoderConfig, dtype: str, platform: str) -> None:
    """Refuse an implementation that cannot run this model of `dtype` on `platform` (cpu, gpu or tpu)."""
    key = f"model.attention is {name}"
    if name == "cudnn" and platform != "gpu":
        fail(f"{key}, which needs an NVIDIA GPU, and this run is on {platform}", "Choose xla")
    if name == "cudnn" and dtype != "bfloat16":
        fail(f"{key}, which computes in 16-bit types, and model.dtype is {dtype}", "Choose bfloat16, or xla")
    if name == "splash" and platform != "tpu":
        fail(f"{key}, which needs a TPU, and this run is on {platform}", "Choose xla, or cudnn on an NVIDIA GPU")
    if name == "splash" and config.head_dim % _BLOCK:
        fail(f"{key}, and the heads of {config.family} have {config.head_dim} dimensions", "Choose xla")
    if name == "splash" and len(set(config.windows)) > 1:
        fail(f"{key}, and the layers of this model have different attention windows", "Choose xla")
