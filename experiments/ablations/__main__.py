"""`python -m experiments.ablations TABLE --runs DIR --out DIR`: stage 3 of the quickstart in variants, several seeds.

Each variant is `configs/quickstart/end_to_end.yaml` with a few keys changed, started from the stage-2 models that
`python -m experiments.seeds --runs DIR` has left; what is finished is not run again. Measured on the test questions
after the last step: recall among ten candidates and exact match of the answers (per cent); over training, the largest
and the median norm of the gradient. Written are TABLE.csv, .md and .png (see `experiments.results`).
"""

import argparse
import itertools
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from clara_jax.errors import fail, run_command
from experiments.processes import run_module
from experiments.results import Row, write_results
from experiments.seeds.__main__ import QUESTIONS, STAGE_2

CONFIG = Path("configs/quickstart/end_to_end.yaml")
EVALUATION = {"path": f"[{QUESTIONS}]", "records": 200, "generate": 200, "max_new_tokens": 8}
TEMPERATURES = (0.02, 0.1, 0.3, 1.0)
Overrides = dict[str, object]  # key of the configuration -> value
TABLES: dict[str, dict[str, Overrides]] = {
    # Paper, Table 7 and the ablation of the reasoner's initialisation.
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


def main() -> None:
    """Run, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs of experiments.seeds")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--steps", type=int, help="instead of the configuration's")
    options = parser.parse_args()
    shared: Overrides = {f"evaluation.{key}": value for key, value in EVALUATION.items()}
    if options.steps is not None:
        shared["steps"] = options.steps
    places = list(itertools.product(TABLES[options.table], range(options.seeds)))

    def run(place: tuple[str, int]) -> Row:
        variant, seed = place
        overrides = {**shared, **TABLES[options.table][variant], "seed": seed}
        return run_variant(options.runs / f"seed_{seed}", options.table, variant, overrides)

    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(run, places))
    print(write_results(rows, options.out, options.table), end="")


def run_variant(of_seed: Path, table: str, variant: str, overrides: Overrides) -> Row:
    """The figures of one run, which is run as far as it is not."""
    start = of_seed / STAGE_2
    if not start.exists():
        fail(f"{start} is missing", f"Run first: python -m experiments.seeds --runs {of_seed.parent} --out DIR")
    run_dir = of_seed / table / variant.replace(" ", "_").replace(",", "")
    keys = {"run_dir": run_dir, "model.start_from": start, "log_every": 1, **overrides}
    arguments = itertools.chain.from_iterable((f"--{key}", value) for key, value in keys.items())
    run_module(run_dir.parent / f"{run_dir.name}.log", "clara_jax.train", "--config", CONFIG, *arguments)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [line for line in lines if "evaluation/loss" in line][-1]
    norms = [line["gradient_norm"] for line in lines if "gradient_norm" in line]
    row: Row = {"variant": variant, "seed": int(str(overrides["seed"]))}
    for name in ("recall@1", "recall@3", "em"):
        row[name] = 100 * last.get(f"evaluation/{name}", float("nan"))
    row |= {"gradient norm, median": statistics.median(norms), "gradient norm, most": max(norms)}
    print(", ".join(f"{column} {value}" for column, value in row.items()), flush=True)
    return row


if __name__ == "__main__":
    run_command(main)
