"""The one decoder-only transformer: a functional Flax module for every supported family.

    decoder = Decoder(config)
    base = decoder.init_base(rng)
    hidden, _ = decoder.apply({"params": base, "lora": adapter}, embeddings, valid)

`params` is the frozen base, layers stacked on a leading axis. `lora` is one role's adapter
(`clara_jax.models.lora`), which mirrors it; without that collection the module is the base model.
"""

import contextlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from clara_jax.models.attention import AttentionName, attend, attend_cudnn, attend_splash
from clara_jax.models.config import DecoderConfig
from clara_jax.models.decoding import KeyValueCache, Layers, write_columns
from clara_jax.models.lora import draw_kept, multiply_wide
from clara_jax.models.precision import wide_product, widen
from clara_jax.models.remat import RematPolicy, keep, remat_policy
from clara_jax.models.rotary import rotary_tables, rotate
from clara_jax.sharding import look_up, over_vocabulary, shard_rows


class LayerContext(NamedTuple):
    """What every layer of one pass shares."""

    cos: Array
    sin: Array
    mask: Array  # [batch, 1, queries, keys]: causal and not padding
    valid: Array  # [batch, queries]: real tokens
    distance: Array  # [queries, keys]: how many columns back a key lies
    filled: Array | None  # columns already in the cache
    rows: Array  # each row's number, from which its dropout is drawn


class DecoderLayer(nn.Module):
    """Pre-norm block: grouped-query attention and SwiGLU, each projection with an optional adapter."""

    config: DecoderConfig
    lora_alpha: float
    lora_dropout: float
    dtype: Any
    attention: AttentionName

    @nn.compact
    def __call__(self, hidden: Array, per_layer: dict[str, Any], context: LayerContext) -> tuple[Array, Any]:
        """The residual stream after this block, and its cache with these columns written."""
        attended, cache = self._attention(self._norm("attention_norm", hidden), per_layer, context)
        hidden = hidden + attended
        hidden = hidden + self._mlp(self._norm("mlp_norm", hidden), context.rows)
        return shard_rows(hidden), cache

    def _attention(self, x: Array, per_layer: dict[str, Any], context: LayerContext) -> tuple[Array, Any]:
        config = self.config
        batch, length, _ = x.shape
        query, key, value = map(keep, self._project(x, context.rows, "q_proj", "k_proj", "v_proj"))
        query = query.reshape(batch, length, config.num_heads, config.head_dim)
        key = key.reshape(batch, length, config.num_kv_heads, config.head_dim)
        value = value.reshape(batch, length, config.num_kv_heads, config.head_dim)
        if config.qk_norm:
            query, key = self._norm("q_norm", query), self._norm("k_norm", key)
        query = rotate(query, context.cos, context.sin)
        key = rotate(key, context.cos, context.sin)
        mask = context.mask
        if "window" in per_layer:
            window = per_layer["window"]
            mask = mask & ((context.distance < window) | (window == 0))
        key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
        cache = None
        if context.filled is not None:
            # Attention reads the cache as written here, not as it was: else the compiler has to keep a copy.
            key = write_columns(per_layer["keys"], key, context.filled)
            value = write_columns(per_layer["values"], value, context.filled)
            cache = key, value
        mixed = self._attend(query, key, value, mask, context).reshape(batch, length, -1)
        return keep(self._project(mixed, context.rows, "o_proj")[0]), cache

    def _attend(self, query: Array, key: Array, value: Array, mask: Array, context: LayerContext) -> Array:
        if context.filled is not None or self.attention == "xla":
            return attend(query, key, value, mask)
        if self.attention == "cudnn":
            return attend_cudnn(query, key, value, mask)
        return attend_splash(query, key, value, context.valid, (self.config.windows or (0,))[0])

    def _mlp(self, x: Array, rows: Array) -> Array:
        gate, up = map(keep, self._project(x, rows, "gate_proj", "up_proj"))
        return self._project(jax.nn.silu(gate) * up, rows, "down_proj")[0]

    def _project(self, x: Array, rows: Array, *names: str) -> list[Array]:
        """`x` through the named frozen projections, each with the low-rank update of its adapter."""
        outputs = {name: self._frozen(x, name) for name in names}
        for site, targets in self.config.adapter_sites.items():
            if targets[0] in names and self.has_variable("lora", site):
                update = self._low_rank(x, rows, site)
                widths = [outputs[name].shape[-1] for name in targets]
                for name, part in zip(targets, _split(update, widths), strict=True):
                    outputs[name] += part
        return list(outputs.values())

    def _frozen(self, x: Array, name: str) -> Array:
        """`x` through the frozen projection `name`."""
        if self.has_variable("transposed", name):
            weights: dict[str, Array] = self.get_variable("transposed", name)
            output = multiply_transposed(weights["kernel"], x)
        else:
            weights = self.param(name, _init_projection, self.config.projections[name], name in self.config.biased)
            output = x @ weights["kernel"].astype(self.dtype)
        return output + weights["bias"].astype(self.dtype) if "bias" in weights else output

    def _low_rank(self, x: Array, rows: Array, site: str) -> Array:
        """Alpha / rank x dropout(x) A B.

        Scaled between A and B, where it is narrowest: scaled at the end, the backward pass would have to write the
        scaled gradient of the whole output.
        """
        adapter: dict[str, Array] = self.get_variable("lora", site)
        scale = self.lora_alpha / adapter["a"].shape[-1]
        if self.lora_dropout > 0 and self.has_rng("dropout"):
            share = 1 - self.lora_dropout
            scale /= share
            x = jnp.where(draw_kept(self.make_rng("dropout"), rows, share, (x.shape[1], x.shape[2])), x, 0)
        down = keep(x @ adapter["a"].astype(self.dtype))
        return multiply_wide(down * scale, adapter["b"].astype(self.dtype))

    def _norm(self, name: str, x: Array) -> Array:
        scale = self.param(name, nn.initializers.ones, (x.shape[-1],))
        return rms_norm(x, scale, self.config.rms_norm_eps)


class Decoder(nn.Module):
    """Embeddings in, final-norm hidden states out; `logits` projects those to the vocabulary.

    `dtype` is the compute type; norms, softmax and logits are float32 in any case, and a float32 decoder
    multiplies at full precision on every platform. `remat` names what the backward pass keeps
    (`clara_jax.models.remat`).
    """

    config: DecoderConfig
    dtype: Any = jnp.bfloat16
    remat: RematPolicy = "everything"
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    attention: AttentionName = "xla"

    def setup(self) -> None:
        """Declare parameters and the stack of layers."""
        config = self.config
        self.embed_table = self.param("embed", nn.initializers.normal(0.02), (config.vocab_size, config.hidden_size))
        layer: Any = DecoderLayer
        policy = remat_policy(self.remat)
        if policy is not None:
            layer = nn.remat(layer, policy=policy, prevent_cse=False)
        self.layers = nn.scan(
            layer,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=config.num_layers,
        )(config, self.lora_alpha, self.lora_dropout, self.dtype, self.attention)
        self.final_norm = self.param("final_norm", nn.initializers.ones, (config.hidden_size,))
        if not config.tied_head:
            self.head = self.param("head", nn.initializers.normal(0.02), (config.hidden_size, config.vocab_size))

    def __call__(
        self,
        embeddings: Float[Array, "batch seq hidden"],
        valid: Bool[Array, "batch seq"],
        cache: KeyValueCache | None = None,
        rows: Int[Array, " batch"] | None = None,
        layers: Layers | None = None,
    ) -> tuple[Float[Array, "batch seq hidden"], KeyValueCache | None]:
        """Hidden states after the final norm, and the cache with these columns added.

        `valid` marks real tokens. Padding may stand on either side of a row: positions count real
        tokens, attention never looks at padding, and rotary attention depends on distances alone, so
        left and right padding give real tokens the same numbers. Dropout of a row is drawn from the rng and
        its number in `rows` (by default its index), so that a part of a batch can draw like the whole. With `layers`
        (of `DecodingWeights`) those are run one after the other, on a cache that is apart too.
        """
        columns, seen, filled = jnp.arange(embeddings.shape[1]), valid, None
        positions = jnp.cumsum(valid, axis=1) - 1
        if cache is not None:
            filled = cache.filled
            columns = columns + filled
            positions = positions + cache.valid.sum(axis=1, keepdims=True)
            seen = write_columns(cache.valid[..., None], valid[..., None], filled)[..., 0]
        cos, sin = rotary_tables(self.config.rope, jnp.maximum(positions, 0), seen.sum(axis=1))
        distance = columns[:, None] - jnp.arange(seen.shape[1])[None, :]
        mask = (distance >= 0)[None, None] & seen[:, None, None, :]
        rows = jnp.arange(valid.shape[0]) if rows is None else rows
        context = LayerContext(cos, sin, mask, valid, distance, filled, rows)
        per_layer: dict[str, Any] = {}
        if any(self.config.windows):
            per_layer["window"] = jnp.asarray(self.config.windows, jnp.int32)
        if cache is not None:
            per_layer |= {"keys": cache.keys, "values": cache.values}
        with self._precision():
            hidden, written = self._run(layers, shard_rows(embeddings.astype(self.dtype)), per_layer, context)
        if cache is not None:
            cache = KeyValueCache(
                written[0], written[1], seen, cache.filled + valid.shape[1], cache.capacity
            ).with_room()
        return rms_norm(hidden, self.final_norm, self.config.rms_norm_eps), cache

    def _run(
        self, layers: Layers | None, hidden: Array, per_layer: dict[str, Any], context: LayerContext
    ) -> tuple[Array, Any]:
        """The hidden states after all layers, and the keys and values of the cache with these columns written."""
        if layers is None:
            return self.layers(hidden, per_layer, context)
        layer = DecoderLayer(self.config, self.lora_alpha, self.lora_dropout, self.dtype, "xla", parent=None)
        written = []
        for number, variables in enumerate(layers):
            of_layer = {name: x[number] for name, x in per_layer.items()}
            hidden, cache = layer.apply(variables, hidden, of_layer, context)
            written.append(cache)
        return hidden, tuple(zip(*written, strict=True))

    def embed(self, tokens: Int[Array, "rows seq"]) -> Float[Array, "rows seq hidden"]:
        """Rows of the frozen embedding table."""
        return look_up(self.embed_table, tokens).astype(self.dtype)

    def logits(
        self, hidden: Float[Array, "*rows hidden"], transposed_head: Float[Array, "vocab hidden"] | None = None
    ) -> Float[Array, "*rows vocab"]:
        """Scores of every vocabulary entry, float32; `transposed_head` (of `DecodingWeights`) in place of the head."""
        head = self.embed_table.T if self.config.tied_head else self.head
        if transposed_head is not None:
            with self._precision():
                return multiply_transposed(transposed_head, hidden)
        logits = wide_product(hidden.astype(self.dtype), over_vocabulary(head.astype(self.dtype)))
        return over_vocabulary(logits)[..., : head.shape[1]]

    def init_base(self, rng: Array) -> dict[str, Any]:
        """Random base parameters (for benchmarks and training a base from scratch)."""
        embeddings = jnp.zeros((1, 1, self.config.hidden_size), self.dtype)
        return self.init(rng, embeddings, jnp.ones((1, 1), bool))["params"]

    def abstract_base(self) -> dict[str, Any]:
        """Shapes of the base parameters, nothing allocated."""
        return jax.eval_shape(self.init_base, jax.random.key(0))

    def empty_cache(self, batch: int, columns: int) -> KeyValueCache:
        """A cache for `batch` rows of at most `columns` tokens."""
        config = self.config
        shape = (config.num_layers, batch, config.num_kv_heads, 0, config.head_dim)
        none = jnp.zeros(shape, self.dtype)
        return KeyValueCache(none, none, jnp.zeros((batch, 0), bool), jnp.zeros((), jnp.int32), capacity=columns)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype != jnp.bfloat16:
            return jax.default_matmul_precision("highest")
        return contextlib.nullcontext()


def multiply_transposed(kernel: Float[Array, "out in"], x: Float[Array, "*rows in"]) -> Float[Array, "*rows out"]:
    """X @ kernel.T, as kernel @ x.T: with the larger factor on the left XLA's CPU code is faster for a few rows."""
    product = jnp.einsum("oi,ri->or", kernel, x.reshape(-1, x.shape[-1]))
    # Without the barrier XLA would turn the transposed product round again.
    return jax.lax.optimization_barrier(product).T.reshape(*x.shape[:-1], -1)


def rms_norm(
    x: Float[Array, "*rows features"], scale: Float[Array, " features"], eps: float
) -> Float[Array, "*rows features"]:
    """X / rms(x) * scale, computed in float32, returned in x's type."""
    widened = widen(x)
    normed = widened * jax.lax.rsqrt(jnp.mean(jnp.square(widened), axis=-1, keepdims=True) + eps)
    return (normed * scale).astype(x.dtype)


def _init_projection(rng: Array, shape: tuple[int, int], biased: bool) -> dict[str, Array]:
    weights = {"kernel": nn.initializers.normal(0.02)(rng, shape)}
    if biased:
        weights["bias"] = jnp.zeros(shape[1])
    return weights


def _split(x: Array, widths: list[int]) -> list[Array]:
    ends = [sum(widths[: i + 1]) for i in range(len(widths) - 1)]
    return jnp.split(x, ends, axis=-1)
