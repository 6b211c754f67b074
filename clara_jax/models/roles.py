"""The three roles of the one decoder: compressor, query reasoner, generator.

A role is a choice of adapter. The parameters of a model are one flat dict:

    {"base": ..., "compressor": adapter, "query_reasoner": adapter, "generator": adapter,
     "memory_tokens": [m, h]}
"""

import dataclasses
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import tree_util
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from clara_jax.models.decoder import Decoder
from clara_jax.models.decoding import DecodingWeights, KeyValueCache, take_apart
from clara_jax.models.lora import merge_adapter
from clara_jax.models.precision import widen

Role = Literal["compressor", "query_reasoner", "generator"]
ROLES: tuple[Role, ...] = ("compressor", "query_reasoner", "generator")
Params = dict[str, Any]
# Batches are made on the host and used on the device.
AnyArray = jax.Array | np.ndarray


@tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncoderInputs:
    """Documents or questions to be read by the compressor or the query reasoner; one text per row.

    `memory_columns[row, i]` is the column of that row's i-th memory token. Padding may be on either side.
    """

    tokens: Int[AnyArray, "*rows length"]
    valid: Bool[AnyArray, "*rows length"]
    memory_columns: Int[AnyArray, "*rows memory"]


@tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GeneratorInputs:
    """Prompts (with answers, in training) to be read by the generator; one sample per row.

    `slots[row, j, i]` is the column of the i-th memory token of the row's j-th document; a column equal to
    the length means that there is no such document. `target_columns` are the columns whose next token is
    an answer token, `target_tokens` those tokens, `target_weights` 1 for each and 0 for padding.
    """

    tokens: Int[AnyArray, "batch length"]
    valid: Bool[AnyArray, "batch length"]
    slots: Int[AnyArray, "batch documents memory"]
    target_columns: Int[AnyArray, "batch targets"]
    target_tokens: Int[AnyArray, "batch targets"]
    target_weights: Float[AnyArray, "batch targets"]


@tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncoderOutputs:
    """What one pass over texts leaves: their memories, the two means of the alignment loss, and all hidden states.

    The means are float32; `hidden` are the final-norm states of every column, of which `memories` are some.
    """

    memories: Float[Array, "*rows memory hidden"]
    memory_mean: Float[Array, "*rows hidden"]
    document_mean: Float[Array, "*rows hidden"]
    hidden: Float[Array, "*rows length hidden"]


@dataclasses.dataclass(frozen=True)
class RoleModel:
    """The decoder together with what the roles need to know of the vocabulary.

    `first_memory_id` is the id of `<MEM0>`; the m memory tokens have consecutive ids.
    """

    decoder: Decoder
    first_memory_id: int

    def encode(
        self,
        params: Params,
        role: Role,
        inputs: EncoderInputs,
        rng: PRNGKeyArray | None = None,
        rows: Int[AnyArray, " batch"] | None = None,
    ) -> tuple[Float[Array, "*rows memory hidden"], Float[Array, "*rows"]]:
        """Memory of every row and its alignment loss, by one pass of `role`'s adapter (see `read`).

        The alignment loss is the mean over the hidden size of (mean memory state - mean document state)^2, float32
        (paper, Eq. for L_MSE).
        """
        outputs = self.read(params, role, inputs, rng, rows)
        alignment = jnp.mean(jnp.square(outputs.document_mean - outputs.memory_mean), axis=-1)
        return outputs.memories, alignment

    def read(
        self,
        params: Params,
        role: Role,
        inputs: EncoderInputs,
        rng: PRNGKeyArray | None = None,
        rows: Int[AnyArray, " batch"] | None = None,
    ) -> EncoderOutputs:
        """Every row read by one pass of `role`'s adapter: memories, means and hidden states.

        A memory is the final-norm hidden state at the row's memory tokens (paper, Sec. 3.1). The document's mean is
        over all real tokens that are not memory tokens. `rng` switches adapter dropout on; `rows` are the numbers of
        the samples in the whole batch (see `Batch`).
        """
        lead = inputs.tokens.shape[:-1]
        tokens, valid, columns = (
            x.reshape(-1, x.shape[-1]) for x in (inputs.tokens, inputs.valid, inputs.memory_columns)
        )
        if rows is not None and len(lead) == 2:  # documents: number them through all samples
            rows = (rows[:, None] * lead[1] + np.arange(lead[1])).reshape(-1)
        hidden, _ = self._read(params, role, self.embed(params, tokens), valid, rng, rows=rows)
        memories = jnp.take_along_axis(hidden, columns[:, :, None], axis=1)
        of_document = valid & ~self._is_memory(params, tokens)
        total = jnp.sum(jnp.where(of_document[:, :, None], widen(hidden), 0.0), axis=1)
        document_mean = total / jnp.maximum(of_document.sum(axis=1, keepdims=True), 1)
        found = EncoderOutputs(memories, widen(memories).mean(axis=1), document_mean, hidden)
        return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), found)

    def target_logits(
        self,
        params: Params,
        inputs: GeneratorInputs,
        memories: Float[Array, "batch documents memory hidden"],
        rng: PRNGKeyArray | None = None,
        rows: Int[AnyArray, " batch"] | None = None,
    ) -> Float[Array, "batch targets vocab"]:
        """Generator logits at the target columns alone, float32. `rng` and `rows` as in `read`."""
        embeddings = self.prompt_embeddings(params, inputs, memories)
        hidden, _ = self._read(params, "generator", embeddings, inputs.valid, rng, rows=rows)
        at_targets = jnp.take_along_axis(hidden, inputs.target_columns[:, :, None], axis=1)
        return self.logits(params, at_targets)

    def prompt_embeddings(
        self,
        params: Params,
        inputs: GeneratorInputs,
        memories: Float[Array, "batch documents memory hidden"],
    ) -> Float[Array, "batch length hidden"]:
        """Token embeddings with each document's memory in its slots."""
        embeddings = self.embed(params, inputs.tokens)
        batch, _, hidden = embeddings.shape
        columns = inputs.slots.reshape(batch, -1)
        values = memories.reshape(batch, -1, hidden).astype(embeddings.dtype)
        # Row by row: indexed by row numbers, rows on several devices would all be gathered on each of them.
        return jax.vmap(lambda row, at, new: row.at[at].set(new, mode="drop"))(embeddings, columns, values)

    def continue_prompt(
        self,
        params: Params,
        embeddings: Float[Array, "batch length hidden"],
        valid: Bool[AnyArray, "batch length"],
        cache: KeyValueCache,
        weights: DecodingWeights | None = None,
    ) -> tuple[Float[Array, "batch vocab"], KeyValueCache]:
        """Logits after the last column, which must be a real token of every row, and the longer cache.

        With `weights` (of `decoding_weights`) the cache must be apart too.
        """
        hidden, grown = self._read(params, "generator", embeddings, valid, None, cache, weights=weights)
        assert grown is not None
        return self.logits(params, hidden[:, -1], weights and weights.head), grown

    def decoding_weights(self, params: Params) -> DecodingWeights:
        """The generator's weights laid out for decoding; its adapter is in the kernels if float32."""
        base, config = params["base"], self.decoder.config
        layers = base["layers"]
        if self.decoder.dtype != jnp.float32:
            lora = {"lora": params["generator"]["layers"]} if "generator" in params else {}
            return DecodingWeights(take_apart({"params": layers, **lora}, config.num_layers), None)
        if "generator" in params:
            layers = merge_adapter(layers, params["generator"], config, self.decoder.lora_alpha)
        transposed = {
            name: {**layers[name], "kernel": jnp.swapaxes(layers[name]["kernel"], 1, 2)} for name in config.projections
        }
        norms = {name: scales for name, scales in layers.items() if name not in transposed}
        head = base["embed"] if config.tied_head else base["head"].T
        return DecodingWeights(take_apart({"params": norms, "transposed": transposed}, config.num_layers), head)

    def embed(self, params: Params, tokens: Int[AnyArray, "rows length"]) -> Float[Array, "rows length hidden"]:
        """Embeddings of tokens; memory tokens have their trained ones."""
        table = cast(Array, self.decoder.apply({"params": params["base"]}, tokens, method="embed"))
        memory_tokens = params["memory_tokens"]
        # A product, since the gradient of a look-up would be gathered on every device, as long as the rows are.
        chosen = jax.nn.one_hot(tokens - self.first_memory_id, memory_tokens.shape[0], dtype=memory_tokens.dtype)
        trained = jnp.matmul(chosen, memory_tokens, precision=jax.lax.Precision.HIGHEST).astype(table.dtype)
        return jnp.where(self._is_memory(params, tokens)[..., None], trained, table)

    def logits(
        self,
        params: Params,
        hidden: Float[Array, "*rows hidden"],
        transposed_head: Float[Array, "vocab hidden"] | None = None,
    ) -> Float[Array, "*rows vocab"]:
        """Vocabulary logits, float32; with a tied head the memory tokens' rows are the trained ones."""
        logits = cast(Array, self.decoder.apply({"params": params["base"]}, hidden, transposed_head, method="logits"))
        if not self.decoder.config.tied_head:
            return logits
        memory_tokens = params["memory_tokens"].astype(self.decoder.dtype)
        of_memory = jnp.matmul(hidden.astype(self.decoder.dtype), memory_tokens.T, preferred_element_type=logits.dtype)
        before, entries = self.first_memory_id, logits.shape[-1]
        after = entries - before - memory_tokens.shape[0]
        of_memory = jnp.pad(of_memory, [(0, 0)] * (logits.ndim - 1) + [(before, after)])
        # Chosen by entry, as logits may lie in parts of the vocabulary, which an update in place would gather.
        return jnp.where(self._is_memory(params, jnp.arange(entries)), of_memory, logits)

    def words_alone(self, params: Params, logits: Float[Array, "*rows vocab"]) -> Float[Array, "*rows vocab"]:
        """The logits with -inf for the memory tokens, which are no words."""
        return jnp.where(self._is_memory(params, jnp.arange(logits.shape[-1])), -jnp.inf, logits)

    def _read(
        self,
        params: Params,
        role: Role,
        embeddings: Array,
        valid: AnyArray,
        rng: PRNGKeyArray | None,
        cache: KeyValueCache | None = None,
        rows: AnyArray | None = None,
        weights: DecodingWeights | None = None,
    ) -> tuple[Array, KeyValueCache | None]:
        variables = {"params": params["base"]}
        if role in params:
            variables["lora"] = params[role]
        rngs = {} if rng is None else {"dropout": rng}
        layers = weights and weights.layers
        read = self.decoder.apply(variables, embeddings, valid, cache, rows, layers, rngs=rngs)
        return cast(tuple[Array, KeyValueCache | None], read)

    def _is_memory(self, params: Params, tokens: AnyArray) -> AnyArray:
        past = self.first_memory_id + params["memory_tokens"].shape[0]
        return (tokens >= self.first_memory_id) & (tokens < past)


def cosine_scores(
    queries: Float[Array, "batch memory hidden"],
    memories: Float[Array, "batch candidates memory hidden"],
) -> Float[Array, "batch candidates"]:
    """Cosine similarity of each row's flattened query with its candidates' flattened memories, float32."""
    queries, memories = widen(queries), widen(memories)
    products = jnp.einsum("bmh,bnmh->bn", queries, memories, precision=jax.lax.Precision.HIGHEST)
    lengths = jnp.sqrt(jnp.sum(jnp.square(queries), axis=(-2, -1)))[:, None]
    lengths = lengths * jnp.sqrt(jnp.sum(jnp.square(memories), axis=(-2, -1)))
    return products / jnp.maximum(lengths, 1e-12)
