"""The BM25 baseline."""

import math
import re
import sys
from collections import Counter

import pytest

from clara_jax.errors import UserError
from clara_jax.scoring.bm25 import Bm25
from clara_jax.scoring.candidates import candidate

TEXTS = ("red apple tree apple", "green tree", "blue sea fish sea bird", "red sea", "red sea")
DOCUMENTS = [candidate(f"T{i}", text) for i, text in enumerate(TEXTS)]
IDS = [document.id for document in DOCUMENTS]


def formula(question, k1=1.5, b=0.75):
    """Lucene's BM25, document by document."""
    split = [Counter(re.findall(r"\w\w+", document.content.lower())) for document in DOCUMENTS]
    mean_length = sum(words.total() for words in split) / len(split)
    scores = []
    for words in split:
        score = 0.0
        for word in question.split():
            having = sum(word in other for other in split)
            rarity = math.log(1 + (len(split) - having + 0.5) / (having + 0.5))
            score += rarity * words[word] / (words[word] + k1 * (1 - b + b * words.total() / mean_length))
        scores.append(score)
    return scores


def test_ranking_is_that_of_the_formula():
    """If this broke, the baseline would be weaker than BM25 is, and the comparison with it unfair."""
    pytest.importorskip("bm25s", reason="the extra 'evaluate' (bm25s) is not installed")
    want = formula("red apple sea")
    order = sorted((i for i in range(len(TEXTS)) if want[i] > 0), key=lambda i: (-want[i], i))
    got = Bm25(DOCUMENTS).rank("Red APPLE, the sea", k=10)
    assert [key for key, _ in got] == [IDS[i] for i in order]
    assert [score for _, score in got] == pytest.approx([want[i] for i in order], rel=1e-5)


def test_candidates_and_k():
    """If this broke, BM25 would rank documents that are no candidates, or give luck's order for a hit."""
    pytest.importorskip("bm25s", reason="the extra 'evaluate' (bm25s) is not installed")
    index = Bm25(DOCUMENTS)
    whole = index.rank("red sea tree", k=10)
    some = index.rank("red sea tree", k=10, among=[IDS[4], IDS[1], IDS[4]])
    assert some == [pair for pair in whole if pair[0] in (IDS[4], IDS[1])]
    assert index.rank("red sea tree", k=2) == whole[:2]
    assert index.rank("red", k=5, among=[]) == index.rank("zebra", k=5) == index.rank("the", k=5) == []
    with pytest.raises(KeyError):
        index.rank("red", k=5, among=["unknown"])


def test_a_corpus_without_words_is_refused():
    """If this broke, an empty corpus would stop deep in the library."""
    pytest.importorskip("bm25s", reason="the extra 'evaluate' (bm25s) is not installed")
    for documents in ([], [candidate("", "the a")]):
        with pytest.raises(UserError, match="BM25 finds no word"):
            Bm25(documents)


def test_without_the_library_the_pip_line_is_named(monkeypatch):
    """If this broke, a user without the extra would see an import error rather than what to install."""
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(UserError, match=r"not installed. Run: pip install 'clara_jax\[evaluate\]'"):
        Bm25(DOCUMENTS)
