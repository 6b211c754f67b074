"""`python -m experiments.two_hop --runs DIR --out DIR`: two-hop questions before and after stage 3.

"What does the mayor of Limholm Wood work as?" needs the document that it names and a second one, which shares no word
with it: the bridging document. Each variant is stage 3 of the quickstart on other questions, started from the stage-2
models that `python -m experiments.seeds --runs DIR` has left; what is finished is not run again. Measured on 200
questions with ten candidates (per cent): how often the document that is named and the bridging one are among the best,
and exact match of the answers from the best three. Written are two_hop.csv, .md and .png (see `experiments.results`).
"""

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from clara_jax.errors import run_command
from experiments.results import Row
from experiments.small_world.make import TRAINING_WORLDS, two_hop_rows
from experiments.small_world.make import Row as Question
from experiments.small_world.world import make_world
from experiments.tables import STAGES, Overrides, evaluate, per_cent, run_tables, stage_2_of, train

SINGLE_HOP = STAGES / "data/end_to_end_train.jsonl"
TRAINING_ROWS, TEST_ROWS = 1000, 200
WHICH = ("named", "bridging")  # the documents of a two-hop question, in the order of its pos_index
# The variant's name -> which questions stage 3 is trained on; none: stage 2's model.
TABLES: dict[str, dict[str, Sequence[str]]] = {
    "two_hop": {
        "stage 2": (),
        "single-hop questions": ("single_hop",),
        "two-hop questions": ("two_hop",),
        "both": ("single_hop", "two_hop"),
    }
}


def run_variant(run_dir: Path, questions: Sequence[str], shared: Overrides) -> Row:
    """The figures of one variant of one seed."""
    data = run_dir.with_name(f"{run_dir.name}_data")
    write_questions(data)
    model = stage_2_of(run_dir)
    if questions:
        files = {"single_hop": SINGLE_HOP, "two_hop": data / "train.jsonl"}
        paths = ",".join(str(files[name]) for name in questions)
        train(run_dir, "end_to_end", {"model.start_from": model, "data.path": f"[{paths}]", **shared})
        model = run_dir
    row: Row = {}
    for which in WHICH:
        asked = ("--setting", "end_to_end", "--k", 3, "--systems", "memory")
        found = evaluate(model, run_dir.with_name(f"{run_dir.name}_{which}"), *asked, questions=data / f"{which}.jsonl")
        for name in ("recall@1", "recall@3", "recall@5"):
            row[f"{which}, {name}"] = per_cent(found["retrieval"]["model"][name])
        row["em"] = per_cent(found["answers"]["memory"]["em"])  # the same questions, and so the same answers
    return row


def write_questions(folder: Path) -> None:
    """Training questions, and the test questions twice, each time with one of their documents as the relevant one."""
    folder.mkdir(parents=True, exist_ok=True)
    of_each = TRAINING_ROWS // TRAINING_WORLDS
    worlds = [f"two hops {number}" for number in range(TRAINING_WORLDS)]
    _write(folder / "train.jsonl", (row for world in worlds for row in _questions(world, "train", of_each)))
    test = list(_questions("two hops", "test", TEST_ROWS))
    for place, which in enumerate(WHICH):
        _write(folder / f"{which}.jsonl", ({**row, "pos_index": [row["pos_index"][place]]} for row in test))


def _questions(seed: str, split: str, count: int) -> Iterable[Question]:
    return two_hop_rows(make_world(seed, split), count, random.Random(f"{seed} {split}"))


def _write(file: Path, rows: Iterable[Question]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Run, and write the table."""
    run_tables(__doc__, TABLES, run_variant)


if __name__ == "__main__":
    run_command(main)
