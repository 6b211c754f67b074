"""`python -m experiments.seeds --runs DIR --out DIR`: the quickstart from several seeds, and the least one reached.

Each seed's curriculum is a run of `clara_jax.train` in a process and a folder of its own; what is finished is not run
again. The model of stage 2 is then evaluated on the same questions: how well it finds documents before it was ever
trained to. Written are `seeds.csv`, `seeds.md` and `seeds.png` (see `experiments.results`); shares are per cent.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from clara_jax.errors import run_command
from clara_jax.evaluation.systems import SYSTEMS
from experiments.processes import run_module
from experiments.results import Row, write_results

CONFIG = Path("configs/quickstart.yaml")
QUESTIONS = Path("configs/quickstart/data/end_to_end_test.jsonl")
STAGE_2 = "2_instruction_tuning"  # its model has not been trained to retrieve
# Column -> where it is in the evaluation of (the whole curriculum, the model before stage 3).
COLUMNS = {
    **{f"em {system}": (0, "answers", system, "em") for system in SYSTEMS},
    "recall@1": (0, "retrieval", "model", "recall@1"),
    "recall@1 before": (1, "retrieval", "model", "recall@1"),
    "recall@1 BM25": (0, "retrieval", "bm25", "recall@1"),
    "recall@3": (0, "retrieval", "model", "recall@3"),
    "recall@3 before": (1, "retrieval", "model", "recall@3"),
    "seconds": (0, "seconds"),
}


def main() -> None:
    """Run, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the seeds' runs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; seconds mean something with 1 alone")
    options = parser.parse_args()
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(lambda seed: run_seed(options.runs / f"seed_{seed}", seed), range(options.seeds)))
    print(write_results(rows, options.out, "seeds"), end="")


def run_seed(run_dir: Path, seed: int) -> Row:
    """The figures of one seed, after its curriculum has been run as far as it is not."""
    if not (run_dir / "results.json").exists():
        run_module(run_dir / "log.txt", "clara_jax.train", "--config", CONFIG, "--run_dir", run_dir, "--seed", seed)
    before = run_dir / "before_end_to_end"
    if not (before / "results.json").exists():
        what = ("--data", QUESTIONS, "--setting", "end_to_end", "--k", 1, "--systems", "memory", "--max_new_tokens", 8)
        log = run_dir / "log_before.txt"
        run_module(log, "clara_jax.evaluate", "--model", run_dir / STAGE_2, *what, "--out", before)
    found = [json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in (run_dir, before)]
    row: Row = {"variant": "quickstart", "seed": seed}
    for column, (which, *keys) in COLUMNS.items():
        value: Any = found[which]
        for key in keys:
            value = value[key]
        row[column] = value if column == "seconds" else 100 * value
    print(", ".join(f"{column} {value}" for column, value in row.items()), flush=True)
    return row


if __name__ == "__main__":
    run_command(main)
