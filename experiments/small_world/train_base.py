"""Train the tiny base from scratch: `python -m experiments.small_world.train_base --out DIR --chats FOLDER`.

Chats are drawn first, once, into FOLDER. The curriculum begins with recall of random words, which is what telling
documents apart by name takes, then asks about one of a few documents, then as the quickstart does; at the end the head
is tied to the embedding, and embeddings are made smaller than memories (`scale_stream`). It prints the exact match on
entities that were never met in training. On an NVIDIA GPU it computes in bfloat16; with `--state FILE` it saves its
progress there and goes on from it.
"""

import argparse
import dataclasses
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np

from clara_jax.data.tokenizer import ClaraTokenizer
from clara_jax.files import replace_bytes
from experiments.small_world.base_data import Mix, draw_chats, mark_answers, pad_chats
from experiments.small_world.base_model import (
    Params,
    as_arrays,
    base_config,
    exact_match,
    init_params,
    make_decoder,
    make_optimizer,
    save_model,
    scale_stream,
    tie_head,
    train_step,
)
from experiments.small_world.recall import Recall
from experiments.small_world.relations import RELATIONS
from experiments.small_world.tokenizer import build_tokenizer, save_tokenizer
from experiments.small_world.world import World, make_world

CHATS_PER_WORLD = 5_000
MOST_TARGETS = 72  # answer tokens of a chat
STREAM = 0.15  # the finished model's residual stream is scaled by: memories are then twelve times as large as words
CHUNK = 10  # steps whose chats are drawn together, and sorted by length into batches
BUCKET = 32  # a batch is as long as its longest chat, rounded up to a multiple of this
CHECK_EVERY = 250  # steps
RECALL = {"words": Recall(pairs=12, key_length=1), "names": Recall(pairs=8, key_length=2)}
# Name -> what the chats are, how many are drawn, and their longest in tokens.
CHATS: dict[str, tuple[Mix, int, int]] = {
    "few": (Mix((1, 3), turns=6, formats=0.1), 100_000, 208),
    "end": (Mix((1, 5), turns=3, formats=0.12, two_hop=0.25), 140_000, 240),
}


@dataclasses.dataclass(frozen=True)
class Phase:
    """Steps on some of the recall rows or chats, in turn; the rate falls to nothing over the last share `decay`."""

    data: tuple[str, ...]
    steps: int
    batch: int
    learning_rate: float
    warm_up: int = 0
    decay: float = 0.0
    tied: bool = False


CURRICULUM = (
    Phase(("words",), 700, 64, 3e-3, warm_up=100),
    Phase(("names",), 300, 64, 3e-3),
    Phase(("few",), 800, 32, 3e-3),
    Phase(("end",), 4_000, 32, 3e-3, decay=0.7),
    Phase(("end", "few"), 400, 24, 2e-3, warm_up=30, decay=0.4, tied=True),
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


def read_chats(folder: Path, name: str, tokenizer: ClaraTokenizer) -> np.ndarray:
    """Padded tokens of the chats of that name, drawn into `folder` if they are not there."""
    file = folder / f"{name}.npz"
    if not file.exists():
        print(f"drawing {file}", flush=True)
        mix, count, length = CHATS[name]
        parts = []
        for start in range(0, count, CHATS_PER_WORLD):
            world = make_world(1000 + 100 * list(CHATS).index(name) + start // CHATS_PER_WORLD, "train")
            chats = draw_chats(world, mix, CHATS_PER_WORLD, tokenizer, random.Random(f"{name} {start}"))
            parts.append(pad_chats(chats, tokenizer, length))
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(file, np.concatenate(parts))
    return np.load(file)["arr_0"]


class Progress(NamedTuple):
    """How far the training has come: the phase, its steps taken, the parameters, the optimizer's state."""

    phase: int
    step: int
    params: Params
    state: Any


def train(out: Path, chats_folder: Path, seed: int, state_file: Path | None) -> None:
    """Run the curriculum and write the model folder; progress is kept in `state_file`, and gone on from."""
    tokenizer = world_tokenizer(out)
    chats = {name: read_chats(chats_folder, name, tokenizer) for name in CHATS}
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    held_out = make_world(0, "test")
    progress = _start(tokenizer, seed)
    if state_file is not None and state_file.exists():
        progress = _restored(progress, state_file.read_bytes())
    began = time.monotonic()
    for number in range(progress.phase, len(CURRICULUM)):
        phase, progress = CURRICULUM[number], _entered(progress, number)
        config = _config(tokenizer, phase.tied)
        decoder, optimizer = make_decoder(config, dtype), make_optimizer(progress.params)
        for step in range(progress.step, phase.steps, CHUNK):
            rng = np.random.default_rng([seed, number, step])
            losses = []
            for batch in _batches(phase, step, chats, tokenizer, rng):
                rate = _rate(phase, progress.step)
                params, state, loss = train_step(decoder, optimizer, progress.params, progress.state, batch, rate)
                progress = Progress(number, progress.step + 1, params, state)
                losses.append(loss)
            if progress.step % CHECK_EVERY == 0 or progress.step >= phase.steps:
                found = _check(config, progress.params, tokenizer, held_out, 128)
                took, loss = time.monotonic() - began, np.mean(losses)
                print(f"phase {number + 1} step {progress.step} {took:.0f} s loss {loss:.4f} | {found}", flush=True)
                if state_file is not None:
                    replace_bytes(state_file, flax.serialization.to_bytes(jax.device_get(progress)))
    params, config = scale_stream(progress.params, STREAM), _config(tokenizer, CURRICULUM[-1].tied)
    save_model(out, params, config)
    print(_check(config, params, tokenizer, held_out, 1024))


def _start(tokenizer: ClaraTokenizer, seed: int) -> Progress:
    params = init_params(make_decoder(_config(tokenizer, tied=False)), seed)
    return Progress(0, 0, params, make_optimizer(params).init(params))


def _entered(progress: Progress, number: int) -> Progress:
    """The progress as phase `number` takes it over from the one before; a head that is tied needs a new optimizer."""
    if number == progress.phase:
        return progress
    if CURRICULUM[number].tied == CURRICULUM[progress.phase].tied:
        return progress._replace(phase=number, step=0)
    params = tie_head(progress.params)
    return Progress(number, 0, params, make_optimizer(params).init(params))


def _restored(start: Progress, content: bytes) -> Progress:
    for number in range(1, flax.serialization.msgpack_restore(content)["phase"] + 1):
        start = _entered(start, number)
    return flax.serialization.from_bytes(start, content)


def _batches(
    phase: Phase, step: int, chats: dict[str, np.ndarray], tokenizer: ClaraTokenizer, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, ...]]:
    """The batches of the phase's next `CHUNK` steps; chats of like length share one."""
    name = phase.data[step // CHUNK % len(phase.data)]
    if name in RECALL:
        words = (tokenizer.special.eos + 1, tokenizer.special.first_memory)
        for _ in range(CHUNK):
            yield RECALL[name].draw(rng, phase.batch, words)
        return
    rows = chats[name][rng.integers(0, len(chats[name]), CHUNK * phase.batch)]
    lengths = (rows != tokenizer.special.pad).sum(axis=1)
    for of_batch in rng.permutation(np.argsort(lengths, kind="stable").reshape(CHUNK, phase.batch)):
        longest = -(-int(lengths[of_batch].max()) // BUCKET) * BUCKET
        yield as_arrays(mark_answers(rows[of_batch, :longest], tokenizer), MOST_TARGETS)


def _check(
    config: dict[str, Any], params: Params, tokenizer: ClaraTokenizer, held_out: World, count: int
) -> dict[str, float]:
    """Exact match in float32 on `count` questions of each sort, about names that no training chat has."""
    decoder = make_decoder(config)
    return {name: exact_match(decoder, params, tokenizer, held_out, mix, count) for name, mix in CHECKS.items()}


def _rate(phase: Phase, step: int) -> float:
    left = 1 - step / phase.steps
    rising = min(1.0, (step + 1) / phase.warm_up) if phase.warm_up else 1.0
    return phase.learning_rate * rising * (max(0.03, min(1.0, left / phase.decay)) if phase.decay else 1.0)


def _config(tokenizer: ClaraTokenizer, tied: bool) -> dict[str, Any]:
    special = tokenizer.special
    return base_config(special.first_memory, special.eos, special.bos, special.pad, tied)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--chats", type=Path, required=True, help="folder of the drawn chats, 21 MB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, help="file to keep and resume the training's state in")
    args = parser.parse_args()
    train(args.out, args.chats, args.seed, args.state)


if __name__ == "__main__":
    main()
