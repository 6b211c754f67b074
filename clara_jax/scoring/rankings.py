"""Scores of one ranking per question, with intervals: recall@k, precision@k, hit@k and MRR.

A ranking is a list of (document id, score), best first, which names each document once: `by_document` makes it
of scored passages. `retrieval_sums` has the sums over arrays that training uses; `trec` the files that other programs
read.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from clara_jax.errors import fail
from clara_jax.scoring.retrieval_sums import KS

Ranking = Sequence[tuple[str, float]]
_DRAWS = 4_000_000  # values drawn at once by the bootstrap: 32 MB


def by_document(passages: Iterable[tuple[str, float]]) -> list[tuple[str, float]]:
    """The ranking of documents by their best passages, from (document id, score) of passages in any order.

    Of equal scores those that come first rank first. A score of NaN ranks last.
    """
    best: dict[str, float] = {}
    for document, score in sorted(passages, key=lambda passage: math.inf if math.isnan(passage[1]) else -passage[1]):
        best.setdefault(document, score)
    return list(best.items())


def ranking_scores(ranking: Ranking, relevant: Sequence[str], ks: Sequence[int] = KS) -> dict[str, float]:
    """`recall@k`, `precision@k`, `hit@k` and `mrr` of one question, each in [0, 1]; nothing without relevant ids.

    Recall is the share of the relevant documents among the first k. Precision is their number over k, even where
    the ranking is shorter. A hit is 1.0 where there is any. MRR is one over the rank of the first relevant
    document, 0.0 where none is ranked. Raises `ValueError` for a ranking that names a document twice.
    """
    documents = [document for document, _ in ranking]
    if len(set(documents)) != len(documents):
        raise ValueError(
            "the ranking names a document twice: rank documents by their best passages first (by_document)"
        )
    wanted = set(relevant)
    if not wanted:
        return {}
    ranks = [rank for rank, document in enumerate(documents, 1) if document in wanted]
    found = {k: sum(rank <= k for rank in ranks) for k in ks}
    return {
        **{f"recall@{k}": found[k] / len(wanted) for k in ks},
        **{f"precision@{k}": found[k] / k for k in ks},
        **{f"hit@{k}": float(found[k] > 0) for k in ks},
        "mrr": 1 / ranks[0] if ranks else 0.0,
    }


def score_rankings(
    rankings: Mapping[str, Ranking], relevant: Mapping[str, Sequence[str]], ks: Sequence[int] = KS
) -> dict[str, dict[str, float]]:
    """`ranking_scores` of each question of `relevant` that has relevant ids, by question id.

    An empty ranking scores 0; other rankings than those of `relevant` play no part. Raises `UserError` for a question
    without a ranking: the rankings would be those of other questions.
    """
    missing = [question for question, wanted in relevant.items() if wanted and question not in rankings]
    if missing:
        fail(
            f"question {missing[0]!r} has relevant documents and no ranking ({len(missing)} such of {len(relevant)})",
            "Rank the documents of the same questions",
        )
    return {q: ranking_scores(rankings[q], wanted, ks) for q, wanted in relevant.items() if wanted}


def mean_scores(scores: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each score over the questions that have scores; empty where none has."""
    rows = [row for row in scores if row]
    return {name: math.fsum(row[name] for row in rows) / len(rows) for name in rows[0]} if rows else {}


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, seed: int, repeats: int = 1000, share: float = 0.95
) -> tuple[float, float]:
    """The interval that holds the middle `share` of the means of `repeats` resamples (percentile bootstrap).

    Each resample draws as many of `values` (one per question) as there are, with replacement; the same seed gives the
    same interval. Raises `ValueError` where there is no value or one is not finite, or for a share outside (0, 1).
    Source: Efron, "Bootstrap methods: another look at the jackknife", 1979.
    """
    sample = np.asarray(values, np.float64)
    if sample.ndim != 1 or not sample.size or not np.isfinite(sample).all():
        raise ValueError("an interval needs a list of finite values, at least one")
    if not 0 < share < 1 or repeats < 1:
        raise ValueError(f"share is {share} (it must be between 0 and 1) and repeats is {repeats} (at least 1)")
    rng = np.random.default_rng(seed)
    rows = max(1, _DRAWS // sample.size)
    means = [
        sample[rng.integers(sample.size, size=(min(rows, repeats - start), sample.size))].mean(axis=1)
        for start in range(0, repeats, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)
