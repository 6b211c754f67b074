"""Which documents are a question's candidates, and which of them the systems answer from."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from clara_jax.errors import fail
from clara_jax.scoring.candidates import Candidate
from clara_jax.scoring.questions import Question, corpus_of
from clara_jax.scoring.rankings import Ranking

Setting = Literal["normal", "oracle", "end_to_end"]
PoolKind = Literal["own", "all"]
SETTINGS: tuple[Setting, ...] = get_args(Setting)
POOLS: tuple[PoolKind, ...] = get_args(PoolKind)


@dataclasses.dataclass(frozen=True)
class Pool:
    """Documents by id, in order. With `own`, a question's candidates are its own documents; else all of them."""

    documents: Mapping[str, Candidate]
    own: bool

    def candidates(self, question: Question) -> Sequence[str]:
        """Ids of the question's candidates, in the file's order."""
        return [document.id for document in question.documents] if self.own else list(self.documents)

    def relevant(self, question: Question) -> tuple[str, ...]:
        """The question's relevant ids; none where the pool lacks one of them, as no ranking could then be right."""
        return question.relevant if all(key in self.documents for key in question.relevant) else ()


def make_pool(questions: Sequence[Question], kind: PoolKind, corpus: Sequence[Candidate] | None = None) -> Pool:
    """The pool of the questions' documents, or of a corpus if there is one (`kind` plays no part then).

    Raises `UserError` where a question has no candidates.
    """
    if corpus is not None:
        return Pool({document.id: document for document in corpus}, own=False)
    documents = {document.id: document for document in corpus_of(questions)}
    without = [question for question in questions if not question.documents]
    if without and (kind == "own" or not documents):
        fail(
            f"question {without[0].id!r} has no documents ({len(without)} such of {len(questions)})",
            "Name documents as the corpus" + ("" if not documents else ", or take those of all questions: pool all"),
        )
    return Pool(documents, own=kind == "own")


def choose(
    questions: Sequence[Question], pool: Pool, setting: Setting, rankings: Mapping[str, Ranking], k: int
) -> dict[str, list[tuple[str, float | None]]]:
    """The documents given to each question, best first, with the retriever's scores (None: it did not rank it).

    They are the best k of the ranking; in the oracle setting the relevant ones come first. Where a ranking is shorter
    than k (BM25 leaves out documents without a common word), other candidates follow in the file's order, so that all
    questions have k documents unless they have fewer candidates. In the oracle setting a question whose relevant
    documents are not known gets none. Raises `UserError` where that is so for all questions.
    """
    chosen: dict[str, list[tuple[str, float | None]]] = {}
    for question in questions:
        scores = dict(rankings[question.id])
        relevant = pool.relevant(question) if setting == "oracle" else ()
        if setting == "oracle" and not relevant:
            chosen[question.id] = []
            continue
        keys = list(dict.fromkeys([*relevant, *scores]))[:k]
        if len(keys) < k:
            keys = list(dict.fromkeys([*keys, *pool.candidates(question)]))[:k]
        chosen[question.id] = [(key, scores.get(key)) for key in keys]
    if not any(chosen.values()):
        fail("no question has relevant documents", "The oracle setting needs them: take setting normal or end_to_end")
    return chosen
