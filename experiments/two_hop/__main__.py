"""`python -m experiments.two_hop --runs DIR --out DIR`: two-hop questions before and after stage 3.

"What does the mayor of Limholm Wood work as?" needs the document that it names and a second one, which shares no word
with it: the bridging document. Of that one the question says no more than the kind (a person), so that the control is
to choose at random among the candidates of its kind. Each variant is stage 3 of the quickstart on other questions,
started from the stage-2 models that `python -m experiments.seeds --runs DIR` has left; what is finished is not run
again. Measured on 200 questions with ten candidates (per cent): how often the document that is named and the bridging
one are among the best, and exact match of the answers from the best three. Written are two_hop.csv, .md and .png (see
`experiments.results`).
"""

import json
import math
import random
import statistics
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
WORLD = "two hops"  # the seed of the test questions' world
DEPTHS = (1, 3, 5)
WHICH = ("named", "bridging")  # the documents of a two-hop question, in the order of its pos_index
# The variant's name -> which questions stage 3 is trained on; an empty list: stage 2's model; None: no model at all.
TABLES: dict[str, dict[str, Sequence[str] | None]] = {
    "two_hop": {
        "any of the right kind": None,
        "stage 2": (),
        "single-hop questions": ("single_hop",),
        "two-hop questions": ("two_hop",),
        "both": ("single_hop", "two_hop"),
    }
}


def run_variant(run_dir: Path, questions: Sequence[str] | None, shared: Overrides) -> Row:
    """The figures of one variant of one seed."""
    if questions is None:
        return of_the_right_kind()
    data = run_dir.with_name(f"{run_dir.name}_data")
    write_questions(data)
    model = stage_2_of(run_dir)
    if questions:
        files = {"single_hop": SINGLE_HOP, "two_hop": data / "train.jsonl"}
        paths = ",".join(str(files[name]) for name in questions)
        train(run_dir, "end_to_end", {"model.start_from": model, "data.path": f"[{paths}]", **shared})
        model = run_dir
    asked = ("--setting", "end_to_end", "--k", 3, "--systems", "memory")
    found = {
        which: evaluate(model, run_dir.with_name(f"{run_dir.name}_{which}"), *asked, questions=data / f"{which}.jsonl")
        for which in WHICH
    }
    recalls = {
        f"{which}, recall@{k}": per_cent(found[which]["retrieval"]["model"][f"recall@{k}"])
        for which in WHICH
        for k in DEPTHS
    }
    return {**recalls, "em": per_cent(found["named"]["answers"]["memory"]["em"])}  # both have the same answers


def of_the_right_kind() -> Row:
    """What to expect of chance: first the candidates of the bridging document's kind in any order, then the others."""
    kind = {entity.document: entity.kind for entity in make_world(WORLD, "test").entities}
    found: dict[str, list[float]] = {f"{which}, recall@{k}": [] for which in WHICH for k in DEPTHS}
    for row in _test_questions():
        named, bridging = row["pos_index"]
        kinds = [kind[document] for document in row["docs"]]
        first = kinds.count(kinds[bridging])
        for k in DEPTHS:
            of_first, of_others = min(1.0, k / first), max(0.0, k - first) / max(1, len(kinds) - first)
            found[f"named, recall@{k}"].append(of_first if kinds[named] == kinds[bridging] else of_others)
            found[f"bridging, recall@{k}"].append(of_first)
    return {**{name: per_cent(statistics.mean(shares)) for name, shares in found.items()}, "em": math.nan}


def write_questions(folder: Path) -> None:
    """Training questions, and the test questions twice, each time with one of their documents as the relevant one."""
    folder.mkdir(parents=True, exist_ok=True)
    of_each = TRAINING_ROWS // TRAINING_WORLDS
    worlds = [f"{WORLD} {number}" for number in range(TRAINING_WORLDS)]
    _write(folder / "train.jsonl", (row for world in worlds for row in _questions(world, "train", of_each)))
    test = _test_questions()
    for place, which in enumerate(WHICH):
        _write(folder / f"{which}.jsonl", ({**row, "pos_index": [row["pos_index"][place]]} for row in test))


def _test_questions() -> list[Question]:
    return list(_questions(WORLD, "test", TEST_ROWS))


def _questions(seed: str, split: str, count: int) -> Iterable[Question]:
    return two_hop_rows(make_world(seed, split), count, random.Random(f"{seed} {split}"))


def _write(file: Path, rows: Iterable[Question]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Run, and write the table."""
    run_tables(__doc__, TABLES, run_variant)


if __name__ == "__main__":
    run_command(main)
