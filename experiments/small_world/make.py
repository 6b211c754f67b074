"""Write the small world as training and test data: `python -m experiments.small_world.make --out DIR --seed 0`.

For each split (`train`, `test`), in the formats of `clara_jax.data.records` (for how many rows of each, see
`WRITERS`):

- `single_SPLIT.jsonl`: a question, its answer, and the one document that has it; three in ten ask for the name;
- `compression_SPLIT.jsonl`: for each document a question list and a paraphrase;
- `instruction_SPLIT.jsonl`: a question, its answer, and three documents in random order, one of which has it;
- `end_to_end_SPLIT.jsonl`: a question, its answer, ten candidates, and in `pos_index` where the document is;
- `two_hop_SPLIT.jsonl`: the same for two-hop questions; `pos_index` holds first the document that the question
  names, then the bridging one, which has the answer.
"""

import argparse
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments.small_world.relations import RELATIONS
from experiments.small_world.words import KINDS
from experiments.small_world.world import (
    Entity,
    Question,
    World,
    ask,
    ask_subject,
    ask_two_hop,
    distractors,
    make_world,
)

# In each world the same names have other facts: what one of them says of a name cannot be learned by heart.
TRAINING_WORLDS = 4
SUBJECT_SHARE = 0.3  # of the questions to single documents that ask for the name
INSTRUCTION_DOCUMENTS = 3
CANDIDATES = 10
Row = dict[str, Any]


def compression_rows(world: World, count: int, rng: random.Random) -> Iterator[Row]:
    """A question-list row and a paraphrase row for each of `count` documents."""
    for entity in rng.sample(world.entities, min(count, len(world.entities))):
        names = [found.name for found in RELATIONS[entity.kind]]
        questions = [ask(entity, name, rng) for name in rng.sample(names, len(names))]
        yield {
            "data_type": "qa",
            "question": [question.text for question in questions],
            "answers": [question.answer for question in questions],
            "docs": [entity.document],
        }
        yield {"data_type": "paraphrase", "answers": [entity.paraphrase], "docs": [entity.document]}


def single_rows(world: World, count: int, rng: random.Random) -> Iterator[Row]:
    """Questions about one document each, which it answers."""
    for _ in range(count):
        entity, name = random_fact(world, rng)
        question = (ask_subject if rng.random() < SUBJECT_SHARE else ask)(entity, name, rng)
        yield {"question": question.text, "answer": question.answer, "docs": [entity.document]}


def instruction_rows(world: World, count: int, rng: random.Random) -> Iterator[Row]:
    """Questions with a few documents; nothing says which of them has the answer."""
    for _ in range(count):
        row = _with_candidates(world, single_hop(world, rng), INSTRUCTION_DOCUMENTS, rng)
        del row["pos_index"]
        yield row


def end_to_end_rows(world: World, count: int, rng: random.Random) -> Iterator[Row]:
    """Single-hop questions with candidates."""
    for _ in range(count):
        yield _with_candidates(world, single_hop(world, rng), CANDIDATES, rng)


def two_hop_rows(world: World, count: int, rng: random.Random) -> Iterator[Row]:
    """Two-hop questions with candidates."""
    for _ in range(count):
        entity = rng.choice(world.by_kind[rng.choice(KINDS)])
        yield _with_candidates(world, ask_two_hop(world, entity, rng), CANDIDATES, rng)


def single_hop(world: World, rng: random.Random) -> Question:
    """A question about a random fact."""
    return ask(*random_fact(world, rng), rng)


def random_fact(world: World, rng: random.Random) -> tuple[Entity, str]:
    """A random entity, every kind equally often, and the name of one of its facts."""
    entity = rng.choice(world.by_kind[rng.choice(KINDS)])
    return entity, rng.choice(list(entity.facts))


# File name -> what writes it, and how many rows for each that is asked for, by split.
WRITERS: dict[str, tuple[Callable[[World, int, random.Random], Iterator[Row]], dict[str, float]]] = {
    "single": (single_rows, {"train": 20.0, "test": 1.0}),
    "compression": (compression_rows, {"train": 1.0, "test": 1.0}),
    "instruction": (instruction_rows, {"train": 1.0, "test": 1.0}),
    "end_to_end": (end_to_end_rows, {"train": 15.0, "test": 1.0}),
    "two_hop": (two_hop_rows, {"train": 0.25, "test": 0.25}),
}


def write_world(folder: Path, seed: int, train: int, test: int) -> None:
    """Write all files, from about `train` and `test` documents or questions.

    The test files are of one world, the training files of `TRAINING_WORLDS`, an equal part of each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    splits = (("train", train, [f"{seed} {number}" for number in range(TRAINING_WORLDS)]), ("test", test, [f"{seed}"]))
    for split, count, seeds in splits:
        worlds = [make_world(of_world, split) for of_world in seeds]
        for name, (rows, shares) in WRITERS.items():
            rng = random.Random(f"{seed} {split} {name}")
            of_each = math.ceil(shares[split] * count / len(worlds))
            written = [row for world in worlds for row in rows(world, of_each, rng)]
            text = "".join(json.dumps(row) + "\n" for row in written)
            (folder / f"{name}_{split}.jsonl").write_text(text, encoding="utf-8")


def _with_candidates(world: World, question: Question, count: int, rng: random.Random) -> Row:
    entities = [*question.path, *distractors(world, question.path, count - len(question.path), rng)]
    order = rng.sample(range(count), count)
    return {
        "question": question.text,
        "answer": question.answer,
        "docs": [entities[i].document for i in order],
        "pos_index": [order.index(i) for i in range(len(question.path))],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=400, help="documents or questions of the training files")
    parser.add_argument("--test", type=int, default=200, help="the same of the test files")
    args = parser.parse_args()
    write_world(args.out, args.seed, args.train, args.test)


if __name__ == "__main__":
    main()
