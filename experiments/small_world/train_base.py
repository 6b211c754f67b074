"""Train the tiny base from scratch: `python -m experiments.small_world.train_base --out configs/quickstart/base`.

The curriculum first asks about one document, then about several at once, then as the quickstart does: one
question in a chat. It ends by printing the exact match on entities that were never met in training. With
`--state FILE` it saves its progress there and goes on from it; an interruption does not change the result.
"""

import argparse
import dataclasses
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.serialization
import jax

from clara_jax.data.tokenizer import ClaraTokenizer
from experiments.small_world.base_data import Mix, draw_chats, pad_chats
from experiments.small_world.base_model import (
    as_arrays,
    base_config,
    exact_match,
    init_params,
    make_decoder,
    make_optimizer,
    save_model,
    train_step,
)
from experiments.small_world.relations import RELATIONS
from experiments.small_world.tokenizer import build_tokenizer, save_tokenizer
from experiments.small_world.world import make_world

STEPS_PER_WORLD = 100


@dataclasses.dataclass(frozen=True)
class Phase:
    """Some steps on one mix; `length` and `targets` are the tokens and the answer tokens of a row at most."""

    steps: int
    mix: Mix
    batch: int
    length: int
    targets: int


CURRICULUM = (
    Phase(400, Mix((1, 1), turns=4, formats=0.2), batch=32, length=112, targets=72),
    Phase(400, Mix((1, 3), turns=6, formats=0.1), batch=24, length=200, targets=72),
    Phase(700, Mix((2, 2), turns=6, strangers=True), batch=24, length=176, targets=24),
    Phase(500, Mix((1, 3), turns=6), batch=24, length=200, targets=24),
    Phase(400, Mix((1, 3), turns=1, two_hop=0.3, formats=0.1), batch=40, length=144, targets=72),
)
CHECKS = {
    "1 document": Mix((1, 1)),
    "2 documents of strangers": Mix((2, 2), strangers=True),
    "3 documents": Mix((3, 3)),
    "5 documents": Mix((5, 5)),
    "two hops, 2 or 3 documents": Mix((3, 3), two_hop=1.0),
}


def world_tokenizer(folder: Path) -> ClaraTokenizer:
    """Build, save and load the tokenizer of the training names' world."""
    world = make_world(0, "train", dict.fromkeys(("person", "place", "company", "work"), 10_000))
    texts = [text for entity in world.entities for text in (entity.document, entity.paraphrase)]
    for relations in RELATIONS.values():
        for relation in relations:
            wordings = (*relation.statements, *relation.questions, relation.description)
            texts += [text.format(s=" ", o=" ") for text in wordings]
    save_tokenizer(folder, build_tokenizer(texts))
    return ClaraTokenizer(folder, 1)


def train(out: Path, seed: int, learning_rate: float, state_file: Path | None) -> None:
    """Run the curriculum and write the model folder."""
    tokenizer = world_tokenizer(out)
    special = tokenizer.special
    config = base_config(special.first_memory, special.eos, special.bos, special.pad)
    decoder = make_decoder(config)
    steps = sum(phase.steps for phase in CURRICULUM)
    params = init_params(decoder, seed)
    optimizer = make_optimizer(params, learning_rate, steps)
    kept: dict[str, Any] = {"params": params, "state": optimizer.init(params), "step": 0, "seconds": 0.0}
    if state_file is not None and state_file.exists():
        kept = flax.serialization.from_bytes(kept, state_file.read_bytes())
    params, state, first = kept["params"], kept["state"], kept["step"]
    held_out = make_world(0, "test")
    began = time.monotonic() - kept["seconds"]
    for step, phase in enumerate(_phases()):
        if step < first:
            continue
        if step % STEPS_PER_WORLD == 0 or step == first:
            world = make_world(1000 * (seed + 1) + step // STEPS_PER_WORLD, "train")
        chats = draw_chats(world, phase.mix, phase.batch, tokenizer, random.Random(f"{seed} {step}"))
        batch = pad_chats(chats, tokenizer, phase.length)
        params, state, loss, hits = train_step(decoder, optimizer, params, state, as_arrays(batch, phase.targets))
        done = step + 1
        if done % 100 == 0 or done == steps:
            found = " ".join(
                f"{name}: {exact_match(decoder, params, tokenizer, held_out, mix, 128):.3f}"
                for name, mix in CHECKS.items()
            )
            seconds = time.monotonic() - began
            print(f"step {done} {seconds:.0f} s loss {loss:.4f} token accuracy {hits:.3f} | {found}", flush=True)
            save_model(out, params, config)
            if state_file is not None:
                now = {"params": params, "state": state, "step": done, "seconds": seconds}
                state_file.write_bytes(flax.serialization.to_bytes(jax.device_get(now)))
    for name, mix in CHECKS.items():
        print(f"{name}: exact match {exact_match(decoder, params, tokenizer, held_out, mix, 1024):.4f}")


def _phases() -> Iterator[Phase]:
    for phase in CURRICULUM:
        for _ in range(phase.steps):
            yield phase


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--state", type=Path, help="file to keep and resume the training's state in")
    args = parser.parse_args()
    train(args.out, args.seed, args.learning_rate, args.state)


if __name__ == "__main__":
    main()
