"""The command line of experiments that run variants of the quickstart from several seeds, and tell them apart."""

import argparse
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from clara_jax.errors import fail
from experiments.processes import run_module
from experiments.results import Row, in_one_line, write_results

STAGES = Path("configs/quickstart")
QUESTIONS = STAGES / "data/end_to_end_test.jsonl"
STAGE_2 = "2_instruction_tuning"  # a curriculum's model that has not been trained to retrieve
Overrides = dict[str, object]  # key of a stage's configuration -> value


@dataclasses.dataclass(frozen=True)
class Table:
    """A table that is written: its name, the folder of its files, and each variant's run folders, one of each seed."""

    name: str
    out: Path
    runs: Mapping[str, Sequence[Path]]


def run_tables(
    description: str | None, tables: Mapping[str, Mapping[str, Any]], run: Callable[[Path, Any, Overrides], Row]
) -> Table:
    """Read the command line, run every variant of a table for every seed, write the figures.

    The command line names the table where there are several. `run` gets the folder of a variant's run
    (RUNS/seed_N/TABLE/VARIANT), the variant, and what all variants share; it runs what has not been run, and gives the
    figures.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if len(tables) == 1:
        parser.set_defaults(table=next(iter(tables)))
    else:
        parser.add_argument("table", choices=tables)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--steps", type=int, help="of each stage, instead of the configurations'")
    options = parser.parse_args()
    steps = {} if options.steps is None else {"steps": options.steps}

    seeds, variants = range(options.seeds), tables[options.table]
    folders = {
        (seed, name): options.runs / f"seed_{seed}" / options.table / name.replace(" ", "_").replace(",", "")
        for seed, name in itertools.product(seeds, variants)
    }

    def figures(place: tuple[int, str]) -> Row:
        seed, name = place
        found = run(folders[place], variants[name], {"seed": seed, **steps})
        row: Row = {"variant": name, "seed": seed, **found}
        print(in_one_line(row), flush=True)
        return row

    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(figures, folders))
    print(write_results(rows, options.out, options.table), end="")
    runs = {name: [folders[seed, name] for seed in seeds] for name in variants}
    return Table(options.table, options.out, runs)


def train(run_dir: Path, stage: str, overrides: Overrides) -> None:
    """One stage of the quickstart with keys changed, into `run_dir`; a finished run is left as it is."""
    arguments = itertools.chain.from_iterable((f"--{key}", value) for key, value in overrides.items())
    log = run_dir.parent / f"{run_dir.name}.log"
    run_module(log, "clara_jax.train", "--config", STAGES / f"{stage}.yaml", "--run_dir", run_dir, *arguments)


def stage_2_of(run_dir: Path) -> Path:
    """The stage-2 model of the seed of a variant's run. Raises `UserError` if there is none."""
    of_seed = run_dir.parent.parent
    model = of_seed / STAGE_2
    if not model.exists():
        fail(f"{model} is missing", f"Run: python -m experiments.seeds --runs {of_seed.parent} --out DIR")
    return model


def evaluate(model: Path, out: Path, *asked: object, questions: Path = QUESTIONS) -> dict[str, Any]:
    """What `clara_jax.evaluate` finds of a model on test questions, into `out`; what is there is not made again."""
    if not (out / "results.json").exists():
        arguments = ("--model", model, "--data", questions, "--max_new_tokens", 8, *asked, "--out", out)
        run_module(out.parent / f"{out.name}.log", "clara_jax.evaluate", *arguments)
    return dict(json.loads((out / "results.json").read_text(encoding="utf-8")))


def per_cent(value: float | None) -> float:
    """A share in per cent; not a number where there is none."""
    return math.nan if value is None else 100 * value
