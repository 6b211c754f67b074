"""An evaluation from a questions file to a report's folder, as a command or a curriculum asks for it."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from clara_jax.clara import Clara
from clara_jax.corpus.documents import read_documents
from clara_jax.errors import fail, require_package
from clara_jax.evaluation import retrievers
from clara_jax.evaluation.pool import Pool, choose, make_pool
from clara_jax.evaluation.report import write_report
from clara_jax.evaluation.run import Evaluated, EvaluationSettings, evaluate
from clara_jax.evaluation.systems import Decoding
from clara_jax.scoring.bm25 import require_bm25s
from clara_jax.scoring.candidates import Candidate
from clara_jax.scoring.questions import Question, read_questions


@dataclasses.dataclass(frozen=True)
class EvaluationTask:
    """The questions file `data` (of it the first `limit`), what is asked, and how answers are generated.

    `corpus` are sources of documents, as for clara_jax.compress, that are the candidates instead of the questions' own.
    """

    data: str
    settings: EvaluationSettings
    decoding: Decoding
    limit: int | None = None
    corpus: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            fail(f"limit is {self.limit}", "Give at least 1")


@dataclasses.dataclass(frozen=True)
class PreparedEvaluation:
    """A task whose data is read."""

    task: EvaluationTask
    questions: Sequence[Question]
    pool: Pool


def prepare_evaluation(task: EvaluationTask) -> PreparedEvaluation:
    """Read questions and candidates. Raises `UserError` for all that can be seen to be wrong without a model."""
    require_package("matplotlib", "the report", "clara_jax[evaluate]")
    require_bm25s()
    questions = read_questions(Path(task.data))[: task.limit]
    corpus = None
    if task.corpus:
        documents = read_documents(task.corpus)
        corpus = [Candidate(document.id, document.title, document.text) for document in documents]
    settings = task.settings
    pool = make_pool(questions, settings.pool, corpus)
    if settings.retriever == "given":
        retrievers.given(pool)
    choose(questions, pool, settings.setting, {question.id: [] for question in questions}, settings.k)
    return PreparedEvaluation(task, questions, pool)


def evaluate_into(
    folder: Path, prepared: PreparedEvaluation, clara: Clara, model: Mapping[str, str | None]
) -> Evaluated:
    """Evaluate, and write the report into `folder`; `model` says in it which model this is."""
    task = prepared.task
    evaluated = evaluate(clara, prepared.questions, prepared.pool, task.settings, task.decoding)
    described = {
        **model,
        "corpus": task.corpus,
        "limit": task.limit,
        **dataclasses.asdict(task.settings),
        **dataclasses.asdict(task.decoding),
        "data": task.data,
    }
    write_report(folder, evaluated, described)
    return evaluated
