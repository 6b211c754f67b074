"""BM25, the word-matching baseline of retrieval: a thin use of bm25s (the extra `evaluate`).

The library's own settings: Lucene's formula with k1 = 1.5 and b = 0.75, words of at least two letters or digits in
lower case, English stop words left out, no stemming. Source: Lu, "BM25S", arXiv 2407.03618.
"""

import logging
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from clara_jax.errors import fail, require_package
from clara_jax.scoring.candidates import Candidate


class Bm25:
    """An index of documents, by their titles and texts. Raises `UserError` without bm25s or without any word."""

    def __init__(self, documents: Sequence[Candidate]):
        self._library = require_bm25s()
        self._ids = [document.id for document in documents]
        self._places = {key: place for place, key in enumerate(self._ids)}
        words = self._words([document.content for document in documents])
        if not any(words):
            fail(f"BM25 finds no word in {len(documents)} documents", "Give documents with text")
        self._index = self._library.BM25()
        self._index.index(words, show_progress=False)

    def rank(self, question: str, k: int, among: Collection[str] | None = None) -> list[tuple[str, float]]:
        """The best k documents (all of them, or those with the ids `among`) and their scores, best first.

        Of equal scores the documents that come first rank first. Documents that share no word with the question are
        left out. How rare a word is counts over all documents, whatever `among` says. Raises `KeyError` for an id
        that the index does not have.
        """
        words = self._words([question])[0]
        if not words:
            return []
        scores = self._index.get_scores(words)
        places = slice(None) if among is None else sorted({self._places[key] for key in among})
        candidates = np.arange(len(scores))[places]
        candidates = candidates[scores[candidates] > 0]
        best = candidates[np.argsort(-scores[candidates], kind="stable")[:k]]
        return [(self._ids[i], float(scores[i])) for i in best]

    def _words(self, texts: list[str]) -> list[list[str]]:
        return self._library.tokenize(texts, stopwords="english", return_ids=False, show_progress=False)


def require_bm25s() -> Any:
    """The library. Raises `UserError` where it is not installed."""
    bm25s = require_package("bm25s", "BM25", "clara_jax[evaluate]")
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it asks for all of its debug messages
    return bm25s
