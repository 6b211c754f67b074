"""Many prompts to texts: batched by length, with shapes in buckets, so that few programs are compiled.

A batch has at most `batch_rows` prompts, filled up to a power of two. Prompts are padded to the lengths of
`data.collate.round_up`, and there is room for 16, 32, 64, ... new tokens: within such a bucket another prompt, another
number of prompts or another `max_new_tokens` compiles nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from clara_jax.data.collate import pad_exchanges, round_up
from clara_jax.data.samples import Exchange
from clara_jax.data.tokenizer import ClaraTokenizer
from clara_jax.errors import fail
from clara_jax.generation import Sampling, decoding_weights, generate, stream
from clara_jax.models.decoding import DecodingWeights
from clara_jax.models.roles import Params
from clara_jax.pretrained import Pretrained

# Told of a row, and the text that has been added to it.
OnText = Callable[[int, str], None]
_LEAST_NEW = 16


class BatchGenerator:
    """Continues prompts by one model, with its adapters or (if `params` have no generator) as its base alone."""

    def __init__(self, loaded: Pretrained, batch_rows: int = 16):
        if batch_rows < 1:
            fail(f"batch_rows is {batch_rows}", "Give at least 1")
        self._loaded, self._batch_rows = loaded, batch_rows
        self._weights: dict[bool, DecodingWeights | None] = {}

    def __call__(
        self,
        params: Params,
        prompts: Sequence[list[int]],
        memories: Float[Array | np.ndarray, "rows documents memory hidden"],
        max_new_tokens: int,
        sampling: Sampling,
        on_text: OnText | None = None,
    ) -> Int[np.ndarray, "rows {max_new_tokens}"]:
        """New tokens of each prompt (token ids, with memory tokens where its row of memories belongs)."""
        if max_new_tokens < 1:
            fail(f"max_new_tokens is {max_new_tokens}", "Give at least 1")
        special = self._loaded.tokenizer.special
        written = np.full((len(prompts), max_new_tokens), special.pad, np.int32)
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        for start in range(0, len(order), self._batch_rows):
            rows = order[start : start + self._batch_rows]
            written[rows] = self._batch(params, prompts, memories, rows, max_new_tokens, sampling, on_text)
        return written

    def _batch(
        self,
        params: Params,
        prompts: Sequence[list[int]],
        memories: Float[Array | np.ndarray, "rows documents memory hidden"],
        rows: list[int],
        max_new_tokens: int,
        sampling: Sampling,
        on_text: OnText | None,
    ) -> Int[np.ndarray, "batch {max_new_tokens}"]:
        special, documents = self._loaded.tokenizer.special, memories.shape[1]
        filled = rows + [rows[0]] * ((1 << (len(rows) - 1).bit_length()) - len(rows))
        exchanges = [Exchange(prompts[row], len(prompts[row])) for row in filled]
        longest = len(prompts[rows[-1]])
        inputs = pad_exchanges(
            exchanges, [documents] * len(filled), special, round_up(longest, 1 << 30), 1, "left", at_least=documents
        )
        settings: dict[str, Any] = {
            "max_new_tokens": max(_LEAST_NEW, 1 << (max_new_tokens - 1).bit_length()),
            "stop_ids": self._loaded.stop_ids,
            "pad_id": special.pad,
            "limit": max_new_tokens,
            "rows": np.array(rows + [-1] * (len(filled) - len(rows)), np.int32),
            "draw": sampling.draw,
            "weights": self._weights_of(params),
        }
        model, of_rows = self._loaded.model, jnp.asarray(memories)[np.array(filled)]
        if on_text is None:
            new = np.asarray(generate(model, params, inputs, of_rows, **settings))
            return new[: len(rows), :max_new_tokens]
        texts = [TextStream(self._loaded.tokenizer) for _ in rows]
        written = np.full((len(rows), max_new_tokens), special.pad, np.int32)
        for step, tokens in enumerate(stream(model, params, inputs, of_rows, **settings)):
            written[:, step] = tokens[: len(rows)]
            for row, text, token in zip(rows, texts, tokens.tolist(), strict=False):
                if piece := text.add(token):
                    on_text(row, piece)
        for row, text in zip(rows, texts, strict=True):
            if piece := text.end():
                on_text(row, piece)
        return written

    def _weights_of(self, params: Params) -> DecodingWeights | None:
        """The weights to decode with, with or without the generator's adapter, made once."""
        adapted = "generator" in params
        if adapted not in self._weights:
            self._weights[adapted] = decoding_weights(self._loaded.model, params)
        return self._weights[adapted]


class TextStream:
    """Tokens of one text, in; the text that they complete, out. All pieces joined are the text of all tokens."""

    def __init__(self, tokenizer: ClaraTokenizer):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._given = ""

    def add(self, token: int) -> str:
        """What the token adds; nothing yet where later ones may change it.

        That is so in the middle of a character, and in a run of byte tokens (`<0x0A>`), which is read as a whole.
        """
        self._tokens.append(token)
        if self._tokenizer.is_byte(token):
            return ""
        text = self._tokenizer.decode(self._tokens)
        return "" if text.endswith("\ufffd") else self._give(text)

    def end(self) -> str:
        """What was held back."""
        return self._give(self._tokenizer.decode(self._tokens))

    def _give(self, text: str) -> str:
        piece, self._given = text[len(self._given) :], text
        return piece
