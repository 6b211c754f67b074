"""`python -m experiments.seeds --runs DIR --out DIR`: the quickstart from several seeds, and the least one reached.

Each seed's curriculum is a run of `clara_jax.train` in a process and a folder of its own; what is finished is not run
again. The model of stage 2 is then evaluated on the same questions: what it answers given the right document, and how
well it finds documents before it was ever trained to. Written are `seeds.csv`, `seeds.md` and `seeds.png` (see
`experiments.results`): exact match of each system, and recall among ten candidates, in per cent.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from clara_jax.errors import run_command
from clara_jax.evaluation.systems import SYSTEMS
from experiments.processes import run_module
from experiments.results import Row, in_one_line, write_results
from experiments.tables import STAGE_2, evaluate, per_cent

CONFIG = Path("configs/quickstart.yaml")
# Column -> where it is in the evaluation of (stage 2's model, given the right document; the whole curriculum).
COLUMNS = {
    **{f"stage 2, {system}": (0, "answers", system, "em") for system in SYSTEMS},
    **{f"stage 2, {name}": (0, "retrieval", "model", name) for name in ("recall@1", "recall@3")},
    **{f"stage 3, {system}": (1, "answers", system, "em") for system in SYSTEMS},
    **{f"stage 3, {name}": (1, "retrieval", "model", name) for name in ("recall@1", "recall@3")},
    **{f"BM25, {name}": (1, "retrieval", "bm25", name) for name in ("recall@1", "recall@3")},
    "seconds": (1, "seconds"),
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
    of_stage_2 = evaluate(run_dir / STAGE_2, run_dir / "evaluation_of_stage_2", "--setting", "oracle", "--k", 1)
    found = of_stage_2, json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    row: Row = {"variant": "quickstart", "seed": seed}
    for column, (which, *keys) in COLUMNS.items():
        value: Any = found[which]
        for key in keys:
            value = value[key]
        row[column] = value if column == "seconds" else per_cent(value)
    print(in_one_line(row), flush=True)
    return row


if __name__ == "__main__":
    run_command(main)
