"""`python -m experiments.end_to_end TABLE --runs DIR --out DIR`: stage 3 of the quickstart in variants, several seeds.

Each variant is `configs/quickstart/end_to_end.yaml` with a few keys changed, started from the stage-2 models that
`python -m experiments.seeds --runs DIR` has left; what is finished is not run again. Measured on the test questions
after the last step: recall among ten candidates and exact match of the answers (per cent); over training, the largest
and the median norm of the gradient. Written are TABLE.csv, .md and .png (see `experiments.results`), and how loss,
recall and gradient norm went over training, TABLE_curves.png.
"""

import itertools
import json
import statistics
from pathlib import Path
from typing import Any

from clara_jax.errors import run_command
from experiments.results import Row, draw_curves
from experiments.tables import QUESTIONS, Overrides, per_cent, run_tables, stage_2_of, train

EVALUATION: Overrides = {
    "evaluation.path": f"[{QUESTIONS}]",
    "evaluation.records": 200,
    "evaluation.generate": 200,
    "evaluation.max_new_tokens": 8,
}
CURVES = ("loss", "recall@1", "gradient_norm")
TEMPERATURES = (0.02, 0.1, 0.3, 1.0)
TABLES: dict[str, dict[str, Overrides]] = {
    # Paper, Table 7 and the ablations of the reasoner.
    "reasoner": {
        "end to end": {},
        "reasoner frozen": {"trainable": "[generator]"},
        "reasoner new": {"model.start_fresh": "[query_reasoner]"},
        "generator frozen": {"trainable": "[query_reasoner]"},
        "compressor trained too": {"trainable": "[query_reasoner,generator,compressor]"},
        "labels, no answers": {"stage": "retrieval_pretraining"},
    },
    "top_k": {f"k = {k}": {"objective.top_k": k} for k in (1, 2, 3, 5, 10)},
    "estimators": {
        f"{estimator}, {temperature}": {"objective.estimator": estimator, "objective.temperature": temperature}
        for estimator, temperature in itertools.product(("sequential", "gumbel"), TEMPERATURES)
    },
}


def run_variant(run_dir: Path, overrides: Overrides, shared: Overrides) -> Row:
    """The figures of one variant of one seed."""
    start: Overrides = {"model.start_from": stage_2_of(run_dir), "log_every": 1}
    train(run_dir, "end_to_end", {**start, **EVALUATION, **shared, **overrides})
    lines = _metrics(run_dir)
    last = [line for line in lines if "evaluation/loss" in line][-1]
    norms = _over_training(lines, "gradient_norm")
    return {
        **{name: per_cent(last.get(f"evaluation/{name}")) for name in ("recall@1", "recall@3", "em")},
        "gradient norm, median": statistics.median(norms),
        "gradient norm, most": max(norms),
    }


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _over_training(lines: list[dict[str, Any]], name: str) -> list[float]:
    return [line[name] for line in lines if name in line]


def main() -> None:
    """Run, write the table, and draw the curves."""
    table = run_tables(__doc__, TABLES, run_variant)
    metrics = {variant: list(map(_metrics, runs)) for variant, runs in table.runs.items()}
    curves = {
        name: {variant: [_over_training(lines, name) for lines in seeds] for variant, seeds in metrics.items()}
        for name in CURVES
    }
    draw_curves(curves, table.out / f"{table.name}_curves.png", over=10)


if __name__ == "__main__":
    run_command(main)
