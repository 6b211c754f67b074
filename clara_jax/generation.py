"""Generation: one prefill of the prompts, then one token at a time with a key-value cache.

`generate` runs to the end on the device. `stream` gives out every step's tokens as they come; both make the same ones.
Programs are compiled for the shapes of the prompts, of the memories and for `max_new_tokens`, the size of the result;
`limit`, temperature, top-p and seed are data, and change without compiling.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from clara_jax.errors import fail
from clara_jax.models.decoding import DecodingWeights, KeyValueCache, decodes_apart
from clara_jax.models.roles import AnyArray, GeneratorInputs, Params, RoleModel


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: What logits are divided by; 0 takes the best token each time.
        top_p: Draw among the fewest likeliest tokens whose probabilities reach this share.
        seed: Seed of the draws; those of a row depend on it and on the row's number alone.

    """

    temperature: float | int = 0.0
    top_p: float | int = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        # Logits divided by less than this may overflow, and then no token would be the likeliest.
        if self.temperature != 0 and not 1e-6 <= self.temperature < float("inf"):
            fail(f"temperature is {self.temperature}", "Give 0, or a number from 0.000001 on")
        if not 0 < self.top_p <= 1:
            fail(f"top_p is {self.top_p}", "Give a share above 0, at most 1")
        if not 0 <= self.seed < 2**32:
            fail(f"seed is {self.seed}", "Give a whole number from 0 to 4294967295")

    @property
    def draw(self) -> "Draw | None":
        """What the program needs to draw; none for the best token each time."""
        if self.temperature == 0:
            return None
        return Draw(jax.random.key(self.seed), jnp.float32(self.temperature), jnp.float32(self.top_p))


GREEDY = Sampling()


class Draw(NamedTuple):
    """A sampling as data of a program."""

    rng: PRNGKeyArray
    temperature: Float[Array, ""]
    top_p: Float[Array, ""]


class _State(NamedTuple):
    """A generation after `step` tokens: all of them, the logits of the next, and which rows have ended."""

    step: Int[Array, ""]
    written: Int[Array, "batch new_tokens"]
    logits: Float[Array, "batch vocab"]
    done: Bool[Array, " batch"]
    cache: KeyValueCache


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "stop_ids", "pad_id"))
def generate(
    model: RoleModel,
    params: Params,
    prompts: GeneratorInputs,
    memories: Float[AnyArray, "batch documents memory hidden"],
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    pad_id: int,
    limit: int | Int[Array, ""] | None = None,
    rows: Int[AnyArray, " batch"] | None = None,
    draw: Draw | None = None,
    weights: DecodingWeights | None = None,
) -> Int[Array, "batch {max_new_tokens}"]:
    """New tokens of every row, at most `limit` (by default all `max_new_tokens`).

    Prompts are padded on the left. A row ends with one of `stop_ids` (which is kept); what follows is `pad_id`. The
    loop ends when every row has. `rows` are numbers from which rows draw (by default their places); a row with a
    number below 0 is padding, and has ended before it begins. Without `draw` the best token is taken each time.
    `weights` are those of `decoding_weights`, which are made anew in every call that is not given any.
    """
    limit = max_new_tokens if limit is None else limit
    weights = decoding_weights(model, params) if weights is None else weights
    state = _prefill(model, params, weights, prompts, memories, max_new_tokens, pad_id, rows)

    def unfinished(state: _State) -> Array:
        return (state.step < limit) & ~jnp.all(state.done)

    def advance(state: _State) -> _State:
        return _advance(model, params, weights, state, stop_ids, pad_id, rows, draw)

    return jax.lax.while_loop(unfinished, advance, state).written


def stream(
    model: RoleModel,
    params: Params,
    prompts: GeneratorInputs,
    memories: Float[AnyArray, "batch documents memory hidden"],
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    pad_id: int,
    limit: int | None = None,
    rows: Int[AnyArray, " batch"] | None = None,
    draw: Draw | None = None,
    weights: DecodingWeights | None = None,
) -> Iterator[Int[np.ndarray, " batch"]]:
    """The tokens of `generate` step by step, one of each row; rows that have ended give `pad_id`."""
    weights = decoding_weights(model, params) if weights is None else weights
    state = _jitted_prefill(model, params, weights, prompts, memories, max_new_tokens, pad_id, rows)
    for step in range(max_new_tokens if limit is None else limit):
        if bool(jnp.all(state.done)):
            return
        state = _jitted_advance(model, params, weights, state, stop_ids, pad_id, rows, draw)
        yield np.asarray(state.written[:, step])


def choose(
    logits: Float[Array, "batch vocab"], rows: Int[AnyArray, " batch"], step: Int[Array, ""], draw: Draw | None
) -> Int[Array, " batch"]:
    """The next token of every row: the likeliest, or one drawn (temperature first, then top-p)."""
    if draw is None:
        return best_token(logits)
    logits = logits / draw.temperature
    ordered = jnp.sort(logits, axis=-1, descending=True)
    shares = jax.nn.softmax(ordered, axis=-1)
    inside = jnp.cumsum(shares, axis=-1) - shares < draw.top_p  # the likelier ones alone do not reach it
    least = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
    allowed = jnp.where(logits >= least, logits, -jnp.inf)

    def one(row: Array, allowed: Array) -> Array:
        rng = jax.random.fold_in(jax.random.fold_in(draw.rng, row), step)
        return jax.random.categorical(rng, allowed)

    return jax.vmap(one)(jnp.maximum(jnp.asarray(rows), 0), allowed).astype(jnp.int32)


def best_token(logits: Float[Array, "batch vocab"]) -> Int[Array, " batch"]:
    """The first of the largest logits, as `argmax` finds it, which on the CPU takes 20 times as long as `max`."""
    last = logits.shape[-1] - 1
    number = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(logits == largest, number, last), axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def decoding_weights(model: RoleModel, params: Params) -> DecodingWeights | None:
    """The generator's weights laid out for decoding, a copy, where it is faster so; None elsewhere."""
    return model.decoding_weights(params) if decodes_apart(jax.default_backend()) else None


def _prefill(
    model: RoleModel,
    params: Params,
    weights: DecodingWeights | None,
    prompts: GeneratorInputs,
    memories: AnyArray,
    max_new_tokens: int,
    pad_id: int,
    rows: AnyArray | None,
) -> _State:
    batch, length = prompts.tokens.shape
    cache = model.decoder.empty_cache(batch, length + max_new_tokens)
    embeddings = model.prompt_embeddings(params, prompts, jnp.asarray(memories))
    logits, cache = model.continue_prompt(params, embeddings, prompts.valid, cache)
    written = jnp.full((batch, max_new_tokens), pad_id, jnp.int32)
    done = jnp.zeros(batch, bool) if rows is None else jnp.asarray(rows) < 0
    cache = cache if weights is None else cache.apart()
    return _State(jnp.zeros((), jnp.int32), written, logits, done, cache)


def _advance(
    model: RoleModel,
    params: Params,
    weights: DecodingWeights | None,
    state: _State,
    stop_ids: tuple[int, ...],
    pad_id: int,
    rows: AnyArray | None,
    draw: Draw | None,
) -> _State:
    numbers = jnp.arange(len(state.done)) if rows is None else rows
    # Without the generator's adapter it is the base alone, whose vocabulary has no memory tokens.
    logits = state.logits if "generator" in params else model.words_alone(params, state.logits)
    token = jnp.where(state.done, pad_id, choose(logits, numbers, state.step, draw))
    written = jax.lax.dynamic_update_slice(state.written, token[:, None], (0, state.step))
    done = state.done | jnp.isin(token, jnp.asarray(stop_ids, jnp.int32))
    embeddings = model.embed(params, token[:, None])
    logits, cache = model.continue_prompt(params, embeddings, jnp.ones((len(done), 1), bool), state.cache, weights)
    return _State(state.step + 1, written, logits, done, cache)


_jitted_prefill = jax.jit(_prefill, static_argnums=(0, 5, 6))
_jitted_advance = jax.jit(_advance, static_argnums=(0, 4, 5), donate_argnums=3)
