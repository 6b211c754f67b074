"""One evaluation: questions ranked, answered by every system, and scored."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from clara_jax.clara import Clara
from clara_jax.errors import fail
from clara_jax.evaluation import retrievers
from clara_jax.evaluation.memories import Memories
from clara_jax.evaluation.pool import POOLS, SETTINGS, Pool, PoolKind, Setting, choose
from clara_jax.evaluation.retrievers import RETRIEVERS, Retriever
from clara_jax.evaluation.systems import SYSTEMS, Decoding, answer, with_wrong_documents
from clara_jax.scoring.answers import best, cover_exact_match, exact_match, f1
from clara_jax.scoring.questions import Question
from clara_jax.scoring.rankings import Ranking, bootstrap_interval, mean_scores, score_rankings

DEPTH = 100  # documents of a ranking that are kept
_METRICS = {"em": exact_match, "f1": f1, "cover_em": cover_exact_match}
Means = dict[str, dict[str, float]]
Intervals = dict[str, dict[str, tuple[float, float]]]


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """What is asked of an evaluation.

    Args:
        setting: Which documents are given to the systems; normal: the best k of `retriever`; oracle: the relevant
            ones first; end_to_end: the k that the model itself finds.
        pool: Candidates of a question, its own documents or those of all questions.
        k: Documents given to each question.
        systems: Which systems answer.
        retriever: What chooses documents in the settings normal and oracle.
        dense: Dense encoder (sentence-transformers) that is scored as a retriever too.
        rerank: The model and the dense encoder put BM25's best so many in order instead of all; 0 for all.
        seed: Seed of the wrong documents and of the intervals.

    """

    setting: Setting = "normal"
    pool: PoolKind = "own"
    k: int = 5
    systems: tuple[str, ...] = SYSTEMS
    retriever: str = "bm25"
    dense: str | None = None
    rerank: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {"setting": SETTINGS, "pool": POOLS, "retriever": RETRIEVERS}
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                fail(f"{key} is {getattr(self, key)}", f"Give one of {', '.join(allowed)}")
        unknown = [name for name in self.systems if name not in SYSTEMS]
        if unknown or not self.systems:
            fail(f"systems: there is no system {', '.join(unknown) or 'at all'}", f"Give some of {', '.join(SYSTEMS)}")
        if self.k < 1 or self.rerank < 0:
            fail(f"k is {self.k} and rerank {self.rerank}", "Give at least 1 document, and at least 0 to rerank")
        if self.retriever == "dense" and self.dense is None:
            fail("retriever is dense, and no encoder is named", "Name one with --dense, or take another retriever")


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """What came of it: means, 95 % bootstrap intervals, counts, a row for each question, rankings and seconds."""

    answers: Means
    retrieval: Means
    answer_intervals: Intervals
    retrieval_intervals: Intervals
    counts: dict[str, int]
    rows: list[dict[str, Any]]
    rankings: dict[str, dict[str, Ranking]]
    relevant: dict[str, tuple[str, ...]]
    seconds: dict[str, float]


def evaluate(
    clara: Clara, questions: Sequence[Question], pool: Pool, settings: EvaluationSettings, decoding: Decoding
) -> Evaluated:
    """Rank, answer and score. Raises `UserError` where the settings do not fit the data."""
    clock = _Clock()
    memories = Memories(clara, pool.documents)
    rankings = {
        name: clock.timed(f"rank {name}", lambda r=retriever: r(questions, DEPTH))
        for name, retriever in _retrievers(clara, pool, memories, settings).items()
    }
    chooser = "model" if settings.setting == "end_to_end" else settings.retriever
    used = choose(questions, pool, settings.setting, rankings[chooser], settings.k)
    answerable = [question for question in questions if question.answers and used[question.id]]
    keys = {name: [key for key, _ in found] for name, found in used.items()}
    predictions, cut = {}, 0
    if answerable:
        asked = with_wrong_documents(answerable, keys, settings.seed, settings.systems)
        for system in settings.systems:
            made = clock.timed(
                f"answer {system}", lambda s=system: answer(s, clara, memories, pool.documents, asked, decoding)
            )
            predictions[system], cut = made.texts, cut + made.cut
    relevant = {question.id: pool.relevant(question) for question in questions}
    scores = {system: _answer_scores(answerable, texts) for system, texts in predictions.items()}
    found = {name: score_rankings(ranking, relevant) for name, ranking in rankings.items()}
    return Evaluated(
        answers={system: mean_scores(rows.values()) for system, rows in scores.items()},
        retrieval={name: mean_scores(rows.values()) for name, rows in found.items() if rows},
        answer_intervals={system: _intervals(rows, settings.seed) for system, rows in scores.items()},
        retrieval_intervals={name: _intervals(rows, settings.seed) for name, rows in found.items() if rows},
        counts={
            "questions": len(questions),
            "answered": len(answerable),
            "without_accepted_answers": sum(not question.answers for question in questions),
            "without_relevant_documents": sum(not relevant[question.id] for question in questions),
            "documents": len(pool.documents),
            "documents_compressed": len(memories),
            "documents_cut": memories.cut,
            "prompts_cut": cut,
        },
        rows=[_row(question, used[question.id], predictions, scores, found) for question in questions],
        rankings=rankings,
        relevant=relevant,
        seconds=clock.seconds,
    )


class _Clock:
    """Seconds of named parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, work: Any) -> Any:
        start = time.perf_counter()
        result = work()
        self.seconds[name] = time.perf_counter() - start
        return result


def _retrievers(clara: Clara, pool: Pool, memories: Memories, settings: EvaluationSettings) -> dict[str, Retriever]:
    by_words = retrievers.bm25(pool)
    first = by_words if settings.rerank else None
    found = {"model": retrievers.model(clara, pool, memories, first, settings.rerank), "bm25": by_words}
    if settings.dense is not None:
        found["dense"] = retrievers.dense(settings.dense, pool, first, settings.rerank)
    if settings.retriever == "given":
        found["given"] = retrievers.given(pool)
    return found


def _answer_scores(questions: Sequence[Question], texts: dict[str, str]) -> dict[str, dict[str, float]]:
    return {q.id: {name: best(metric, texts[q.id], q.answers) for name, metric in _METRICS.items()} for q in questions}


def _intervals(rows: dict[str, dict[str, float]], seed: int) -> dict[str, tuple[float, float]]:
    names = next(iter(rows.values()), {})
    return {name: bootstrap_interval(np.array([row[name] for row in rows.values()]), seed) for name in names}


def _row(
    question: Question,
    used: Sequence[tuple[str, float | None]],
    predictions: dict[str, dict[str, str]],
    scores: dict[str, dict[str, dict[str, float]]],
    found: dict[str, dict[str, dict[str, float]]],
) -> dict[str, Any]:
    return {
        "id": question.id,
        "question": question.text,
        "accepted": list(question.answers),
        "relevant": list(question.relevant),
        "documents": [{"id": key, "score": score} for key, score in used],
        "answers": {
            system: {"text": texts[question.id], **scores[system][question.id]}
            for system, texts in predictions.items()
            if question.id in texts
        },
        "retrieval": {name: rows[question.id] for name, rows in found.items() if question.id in rows},
    }
