"""Greedy generation: one jitted prefill and a decode loop with a key-value cache."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from clara_jax.models.roles import GeneratorInputs, Params, RoleModel


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "stop_ids", "pad_id"))
def generate(
    model: RoleModel,
    params: Params,
    prompts: GeneratorInputs,
    memories: Float[Array, "batch documents memory hidden"],
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    pad_id: int,
) -> Int[Array, "batch {max_new_tokens}"]:
    """New tokens of every row, best first choice at each step.

    Prompts are padded on the left. A row ends with one of `stop_ids` (which is kept); what follows is
    `pad_id`. The loop ends when every row has.
    """
    batch, length = prompts.tokens.shape
    stops = jnp.asarray(stop_ids, jnp.int32)
    cache = model.decoder.empty_cache(batch, length + max_new_tokens)
    embeddings = model.prompt_embeddings(params, prompts, memories)
    logits, cache = model.continue_prompt(params, embeddings, prompts.valid, cache)
    written = jnp.full((batch, max_new_tokens), pad_id, jnp.int32)

    def unfinished(state: tuple) -> Array:
        step, _, _, done, _ = state
        return (step < max_new_tokens) & ~jnp.all(done)

    def decode(state: tuple) -> tuple:
        step, written, logits, done, cache = state
        token = jnp.where(done, pad_id, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        written = written.at[:, step].set(token)
        done = done | jnp.isin(token, stops)
        embeddings = model.embed(params, token[:, None])
        logits, cache = model.continue_prompt(params, embeddings, jnp.ones((batch, 1), bool), cache)
        return step + 1, written, logits, done, cache

    start = (jnp.zeros((), jnp.int32), written, logits, jnp.zeros(batch, bool), cache)
    return jax.lax.while_loop(unfinished, decode, start)[1]
