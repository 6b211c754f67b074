"""`python -m experiments.seeds --runs DIR --out DIR`: the quickstart from several seeds, and the least one reached.

Each seed's curriculum is a run of `clara_jax.train` in a process and a folder of its own; what is finished is not run
again. The model of stage 2 is then evaluated on the same questions: how well it finds documents before it was ever
trained to. Written are `seeds.csv` (a row for each seed), `seeds.md` (least, mean and most) and `seeds.png`.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from clara_jax.errors import fail, run_command

CONFIG = Path("configs/quickstart.yaml")
QUESTIONS = Path("configs/quickstart/data/end_to_end_test.jsonl")
BEFORE = "2_instruction_tuning"  # the stage whose model has not been trained to retrieve
# Column -> where it is in the evaluation of (the whole curriculum, the model before stage 3).
COLUMNS = {
    **{
        f"em_{system}": (0, "answers", system, "em")
        for system in ("memory", "text", "truncated_text", "no_memory", "wrong_memory")
    },
    "recall@1": (0, "retrieval", "model", "recall@1"),
    "recall@1_before": (1, "retrieval", "model", "recall@1"),
    "recall@1_bm25": (0, "retrieval", "bm25", "recall@1"),
    "recall@3": (0, "retrieval", "model", "recall@3"),
    "recall@3_before": (1, "retrieval", "model", "recall@3"),
    "seconds": (0, "seconds"),
}
Row = dict[str, float]


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
    write_results(rows, options.out)


def run_seed(run_dir: Path, seed: int) -> Row:
    """The figures of one seed, after its curriculum has been run as far as it is not."""
    run_dir.mkdir(parents=True, exist_ok=True)
    if not (run_dir / "results.json").exists():
        _run(run_dir, "clara_jax.train", "--config", CONFIG, "--run_dir", run_dir, "--seed", seed)
    before = run_dir / "before_end_to_end"
    if not (before / "results.json").exists():
        what = ("--data", QUESTIONS, "--setting", "end_to_end", "--k", 1, "--systems", "memory", "--max_new_tokens", 8)
        _run(run_dir, "clara_jax.evaluate", "--model", run_dir / BEFORE, *what, "--out", before)
    found = [json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in (run_dir, before)]
    row = {"seed": float(seed)}
    for column, (which, *keys) in COLUMNS.items():
        value: Any = found[which]
        for key in keys:
            value = value[key]
        row[column] = value if column == "seconds" else 100 * value
    print(", ".join(f"{column} {value:.1f}" for column, value in row.items()), flush=True)
    return row


def write_results(rows: list[Row], out: Path) -> None:
    """CSV, Markdown and picture of the seeds' rows."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "seeds.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({column: round(value, 2) for column, value in row.items()} for row in rows)
    lines = ["| | least | mean | most |", "|---|---|---|---|"]
    for column in COLUMNS:
        values = [row[column] for row in rows]
        lines.append(f"| {column} | {min(values):.1f} | {statistics.mean(values):.1f} | {max(values):.1f} |")
    (out / "seeds.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    _draw(rows).savefig(out / "seeds.png", dpi=120)


def _draw(rows: list[Row]) -> Figure:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    columns = [column for column in COLUMNS if column != "seconds"]
    for place, column in enumerate(columns):
        axes.scatter([row[column] for row in rows], [place] * len(rows), alpha=0.5)
    axes.set(yticks=range(len(columns)), yticklabels=columns, xlabel=f"per cent, {len(rows)} seeds", xlim=(-2, 102))
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    return figure


def _run(run_dir: Path, module: str, *arguments: object) -> None:
    log = run_dir / f"{module}.log"
    with log.open("w", encoding="utf-8") as file:
        command = [sys.executable, "-m", module, *map(str, arguments)]
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        fail(f"{module} ended with {code}, see {log}", "Correct what it says, and give the same command again")


if __name__ == "__main__":
    run_command(main)
