"""Recall of random words: what the base learns first, so that later it can tell documents apart by their names.

A row states `pairs` keys, each with a word after it, and then states them again in another order. To predict a word of
the second half, a model must find where its key stood before, and copy what came next. That is also how a question
about one of several documents is answered; but there it is hidden behind much that is learned sooner.
"""

import dataclasses

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class Recall:
    """Rows of `pairs` keys of `key_length` words each.

    Keys of two words are as names are: the second half of them each share a word with one of the first half.
    """

    pairs: int
    key_length: int

    def draw(self, rng: np.random.Generator, rows: int, words: tuple[int, int]) -> tuple[np.ndarray, ...]:
        """Tokens, valid, columns and weights, as `base_model.as_arrays` gives them for chats.

        Tokens are `[rows, 2 * pairs * (key_length + 1)]`, columns those of the second half's words, `[rows, pairs]`.
        Words are token ids from `words[0]` up to, without it, `words[1]`.
        """
        keys = self._keys(rng, rows, words)
        values = rng.integers(*words, (rows, self.pairs, 1))
        stated = np.concatenate([keys, values], axis=2)
        tokens = np.concatenate([_shuffled(stated, rng), _shuffled(stated, rng)], axis=1).astype(np.int32)
        columns = tokens.shape[1] // 2 + self.key_length + (self.key_length + 1) * np.arange(self.pairs)
        asked = (rows, self.pairs)
        return tokens, np.ones(tokens.shape, bool), np.broadcast_to(columns, asked), np.ones(asked, bool)

    def _keys(
        self, rng: np.random.Generator, rows: int, words: tuple[int, int]
    ) -> Int[np.ndarray, "{rows} {self.pairs} {self.key_length}"]:
        order = np.argsort(rng.random((rows, words[1] - words[0])), axis=1)
        keys = words[0] + order[:, : self.pairs * self.key_length].reshape(rows, self.pairs, self.key_length)
        if self.key_length == 2:
            half = self.pairs // 2
            shares_first = rng.random((rows, half, 1)) < 0.5
            shared = np.where(shares_first, [True, False], [False, True])
            keys[:, half : 2 * half] = np.where(shared, keys[:, :half], keys[:, half : 2 * half])
        return keys


def _shuffled(stated: Int[np.ndarray, "rows pairs width"], rng: np.random.Generator) -> Int[np.ndarray, "rows length"]:
    order = np.argsort(rng.random(stated.shape[:2]), axis=1)
    return np.take_along_axis(stated, order[:, :, None], axis=1).reshape(len(stated), -1)
