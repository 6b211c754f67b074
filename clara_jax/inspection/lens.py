"""The logit lens (paper, Fig. 4): memory tokens, or all tokens of a text, through the output head.

A memory is the final-norm hidden state, which is what the head reads: it is projected as it stands.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from clara_jax.data.collate import pad_encoder_inputs
from clara_jax.data.tokenizer import ClaraTokenizer
from clara_jax.encoding import text_batches
from clara_jax.errors import fail
from clara_jax.models.roles import EncoderInputs, Params, Role, RoleModel
from clara_jax.pretrained import Pretrained, with_query_reasoner

_BATCH_TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class Position:
    """A token of the input, and the tokens that its state decodes to with their probabilities, the likeliest first."""

    token: str
    decoded: list[tuple[str, float]]


@dataclasses.dataclass(frozen=True)
class Topic:
    """A decoded word: among the top tokens of how many memory tokens it is, and the sum of its probabilities there."""

    word: str
    count: int
    mass: float


@dataclasses.dataclass(frozen=True)
class Lens:
    """A text through the lens. `cut` says that its end was not read; `tokens` is empty unless it was asked for."""

    role: Role
    text: str
    cut: bool
    memory: list[Position]
    topics: list[Topic]
    tokens: list[Position]


def logit_lens(
    loaded: Pretrained, role: Role, texts: Sequence[str], top: int = 5, all_tokens: bool = False
) -> list[Lens]:
    """What each of `texts` decodes to when read by the adapter of `role`, in their order.

    `top` tokens are kept per state. With `all_tokens` the states of the text's own tokens are projected too.
    Raises `UserError` for a blank text, or a `top` that is not from 1 to the size of the vocabulary.
    """
    tokenizer, special = loaded.tokenizer, loaded.tokenizer.special
    if not 1 <= top <= len(tokenizer):
        fail(f"--top is {top}", f"Give a number from 1 to {len(tokenizer)}, the size of the vocabulary")
    for number, text in enumerate(texts, 1):
        if not text.strip():
            fail(f"{_KINDS[role]} {number} is blank", "Give some text")
    encoded = tokenizer.encode_passages(list(texts), loaded.checkpoint.doc_max_length)
    sizes = [len(ids) + special.num_memory for ids, _ in encoded]
    params = with_query_reasoner(loaded.params)
    project = _projection(loaded.model, top, all_tokens)
    found: dict[int, Lens] = {}
    for batch in text_batches(np.array(sizes), _BATCH_TOKENS, max(sizes)):
        numbers = batch.texts.tolist()
        inputs = pad_encoder_inputs([encoded[n][0] for n in numbers], special, batch.length)
        probabilities, ids = (x.tolist() for x in jax.device_get(project(params, role, inputs)))
        for row, n in enumerate(numbers):
            passage, cut = encoded[n]
            start = len(passage) if all_tokens else 0
            read = [*passage, *special.memory_ids] if all_tokens else special.memory_ids
            positions = [
                Position(
                    token_name(tokenizer, token),
                    [(token_name(tokenizer, i), p) for i, p in zip(ids[row][at], probabilities[row][at], strict=True)],
                )
                for at, token in enumerate(read)
            ]
            memory = positions[start:]
            found[n] = Lens(role, texts[n], cut, memory, _topics(memory), positions[:start])
    return [found[n] for n in range(len(texts))]


def token_name(tokenizer: ClaraTokenizer, token: int) -> str:
    """A token as text: special tokens by name, white space escaped, parts of a character as the vocabulary has them."""
    text = str(tokenizer.backend.decode([token], skip_special_tokens=False))
    if not text or "\ufffd" in text:
        return tokenizer.backend.convert_ids_to_tokens(token) or f"<id {token}>"
    return text.strip() or repr(text)


def _topics(memory: Sequence[Position]) -> list[Topic]:
    counts: collections.Counter[str] = collections.Counter()
    mass: dict[str, float] = collections.defaultdict(float)
    for position in memory:
        words = [(word, p) for word, p in position.decoded if _is_word(word)]
        counts.update({word for word, _ in words})
        for word, p in words:
            mass[word] += p
    ordered = sorted(counts, key=lambda word: (-counts[word], -mass[word], word))
    return [Topic(word, counts[word], mass[word]) for word in ordered]


def _is_word(name: str) -> bool:
    return any(c.isalnum() for c in name) and not (name.startswith("<") and name.endswith(">"))


_KINDS = {"query_reasoner": "question", "compressor": "document", "generator": "text"}


@functools.lru_cache(maxsize=8)
def _projection(
    model: RoleModel, top: int, all_tokens: bool
) -> Callable[[Params, Role, EncoderInputs], tuple[Float[Array, "rows columns top"], Int[Array, "rows columns top"]]]:
    def project(params: Params, role: Role, inputs: EncoderInputs) -> tuple[Array, Array]:
        outputs = model.read(params, role, inputs)
        states = outputs.hidden if all_tokens else outputs.memories

        def of_row(row: Array) -> tuple[Array, Array]:
            probabilities, ids = jax.lax.top_k(jax.nn.softmax(model.logits(params, row), axis=-1), top)
            return probabilities, ids

        # Row by row: the logits of a whole batch would be gigabytes.
        return jax.lax.map(of_row, states)

    return jax.jit(project, static_argnums=1)
