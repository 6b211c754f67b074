"""The evaluation at the end of a curriculum: `run_dir/results.json`, `run_dir/evaluation`, and what is printed."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

from clara_jax.clara import Clara
from clara_jax.command_line import one_line
from clara_jax.evaluation.report import summary
from clara_jax.evaluation.run import Evaluated
from clara_jax.evaluation.task import PreparedEvaluation, evaluate_into
from clara_jax.files import new_folder, replace_text
from clara_jax.scoring.candidates import Candidate

RESULTS, REPORT = "results.json", "evaluation"
_EXAMPLES = 3  # answered questions that are shown
_SHOWN = 120  # characters of a line


def evaluate_at_end(clara: Clara, prepared: PreparedEvaluation, run_dir: Path, stage: str, started: float) -> str:
    """Evaluate the model of `stage`, the last run's directory, and write what comes out; the text to print of it.

    `started` is when the command was, on the clock of `time.perf_counter`; results.json holds the seconds since.
    """
    with new_folder(run_dir / REPORT, replace=True) as folder:
        evaluated = evaluate_into(folder, prepared, clara, {"model": stage})
    results = {
        "answers": evaluated.answers,
        "retrieval": evaluated.retrieval,
        "seconds": time.perf_counter() - started,
    }
    replace_text(run_dir / RESULTS, json.dumps(results, indent=1) + "\n")
    report = f"Report: {run_dir / REPORT / 'report.html'}"
    return "\n\n".join(filter(None, [summary(evaluated), *_examples(evaluated, prepared.pool.documents), report]))


def _examples(evaluated: Evaluated, documents: Mapping[str, Candidate]) -> list[str]:
    """The first answered questions: the answer of the first system, what is accepted, and the passages used."""
    examples = []
    for row in [row for row in evaluated.rows if row["answers"]][:_EXAMPLES]:
        system, answer = next(iter(row["answers"].items()))
        lines = [
            f"Question: {row['question']}",
            f"Answer ({system}): {answer['text']}",
            f"Accepted: {' / '.join(row['accepted'])}",
        ]
        for rank, used in enumerate(row["documents"], 1):
            score = "unranked" if used["score"] is None else f"{used['score']:.4f}"
            lines.append(f"{rank}. {score}  {documents[used['id']].content}")
        examples.append("\n".join(one_line(line, _SHOWN) for line in lines))
    return examples
