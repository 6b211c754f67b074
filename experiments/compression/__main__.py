"""`python -m experiments.compression --corpus FILE`: documents/s of the compressor beside PyTorch with PEFT.

A Mistral-shaped model of random weights (hidden 512, 8 layers, 8 heads of which 4 are for keys and values, float32)
with a random compressor of rank 16 on every linear layer reads the first documents of a corpus (see `documents`), each
cut to 256 tokens, into 8 memory tokens. Three sides, in turn, on the same token lists and as many threads:

- fixed padding: transformers with PEFT, every document padded to the limit, as the reference does it;
- sorted: the same model, documents sorted by length and padded to the longest of their batch;
- clara_jax: `Encoder`, as `clara_jax.compress` uses it.

PyTorch's batch is, for each of its sides, the fastest of those in `--batches`. Memories must agree. Printed are medians
over the repeats, the ratios also (in brackets) of processor time, which other programs on the machine disturb less;
compiling (a first pass) is off the clock and printed by itself. On a machine that is not quiet, hold everything to one
core (`taskset -c 0`, `--threads 1`): PyTorch's threads wait for one another and lose far more to a busy core.
"""

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from clara_jax.corpus.documents import read_documents
from clara_jax.corpus.passages import titled
from clara_jax.data.tokenizer import LAYOUT_TOKENS
from clara_jax.encoding import Encoded, Encoder
from clara_jax.errors import run_command
from clara_jax.sharding import MeshConfig, make_mesh
from experiments.compression.baseline import compress
from experiments.compression.models import DOC_MAX_LENGTH, Shape, make_models

FIXED, SORTED, OURS = "PyTorch + PEFT, fixed padding", "PyTorch + PEFT, sorted", "clara_jax"
TOLERANCE = 1e-4  # float32 through 8 layers in two libraries; what is wrong in kind is off by a thousand times more

Seconds = tuple[float, float]  # by the clock on the wall, and of processor time of all threads


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="as for clara_jax.compress")
    parser.add_argument("--documents", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32], help="tried for PyTorch")
    parser.add_argument("--batch-tokens", type=int, nargs="+", default=[8192], help="of ours; each is a side")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    documents = list(read_documents([options.corpus]))
    corpus = [titled(document.title, document.text) for document in documents]
    with tempfile.TemporaryDirectory() as folder:
        loaded, other = make_models(Path(folder), corpus, Shape())
    special = loaded.tokenizer.special
    cut = loaded.tokenizer.encode_passages(corpus[: options.documents], DOC_MAX_LENGTH)
    texts = [ids for ids, _ in cut]
    _print_lengths(texts, sum(was_cut for _, was_cut in cut))
    sides: dict[str, Callable[[], Encoded]] = {}
    made: dict[str, Encoded] = {}
    first: dict[str, float] = {}
    for name, pad_to in ((FIXED, DOC_MAX_LENGTH + LAYOUT_TOKENS), (SORTED, None)):
        runs = {size: functools.partial(compress, other, texts, special, size, pad_to) for size in options.batches}
        tried = {size: _timed(run) for size, run in runs.items()}
        best = min(tried, key=lambda size: tried[size][1][0])
        print(f"{name}: batch {best} of", ", ".join(f"{k} ({v[1][0]:.1f} s)" for k, v in tried.items()), flush=True)
        full = f"{name}, batch {best}"
        sides[full], made[full], first[full] = runs[best], tried[best][0], tried[best][1][0]
    fixed, in_order = list(sides)
    for size in options.batch_tokens:
        encoder = Encoder(loaded, loaded.params, make_mesh(MeshConfig()), size)
        full = f"{OURS}, batch_tokens {size}"
        sides[full] = functools.partial(encoder, "compressor", texts)
        made[full], (first[full], _) = _timed(sides[full])
    taken = _in_turn(sides, options.repeats)
    difference = max(_difference(encoded.memories, made[fixed].memories) for encoded in made.values())
    print(f"largest difference between memories, in norm and relative: {difference:.1e}")
    if not difference < TOLERANCE:
        raise SystemExit(f"the sides make other memories: {difference:.1e} is over {TOLERANCE:.0e}")
    print("| | documents/s | tokens/s | padding | first pass s | cores used | times fixed padding | times sorted |")
    print("|---|---|---|---|---|---|---|---|")
    figures = []
    medians = {name: np.median(times, axis=0) for name, times in taken.items()}
    for name, times in taken.items():
        (seconds, processor), encoded = np.median(times, axis=0).tolist(), made[name]
        figure = {
            "side": name,
            "seconds": [wall for wall, _ in times],
            "processor_seconds": [used for _, used in times],
            "cores": processor / seconds,
            "documents_per_second": len(texts) / seconds,
            "tokens_per_second": (encoded.columns - encoded.padding) / seconds,
            "padding": encoded.padding / encoded.columns,
            "first_pass_seconds": first[name],
            "times_fixed": medians[fixed][0] / seconds,
            "times_sorted": medians[in_order][0] / seconds,
            "processor_times_fixed": medians[fixed][1] / processor,
            "processor_times_sorted": medians[in_order][1] / processor,
        }
        figures.append(figure)
        print(
            "| {side} | {documents_per_second:.2f} | {tokens_per_second:.0f} | {padding:.1%} | "
            "{first_pass_seconds:.1f} | {cores:.2f} | {times_fixed:.2f} ({processor_times_fixed:.2f}) | "
            "{times_sorted:.2f} ({processor_times_sorted:.2f}) |".format_map(figure),
            flush=True,
        )
    if options.json:
        settings = {key: value for key, value in vars(options).items() if key not in ("json", "corpus")}
        found = {"settings": settings, "difference": difference, "figures": figures}
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _in_turn(sides: dict[str, Callable[[], Encoded]], repeats: int) -> dict[str, list[Seconds]]:
    """Times of every repeat; the order turns round each time, so that a machine that slows down favours nobody."""
    taken: dict[str, list[Seconds]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name in list(sides) if repeat % 2 == 0 else reversed(sides):
            taken[name].append(_timed(sides[name])[1])
    return taken


def _timed(run: Callable[[], Encoded]) -> tuple[Encoded, Seconds]:
    wall, used = time.perf_counter(), time.process_time()
    encoded = run()
    return encoded, (time.perf_counter() - wall, time.process_time() - used)


def _difference(memories: np.ndarray, expected: np.ndarray) -> float:
    """The largest of all documents' ||difference|| / ||expected||."""
    gaps = np.linalg.norm((memories - expected).reshape(len(expected), -1), axis=1)
    return float((gaps / np.linalg.norm(expected.reshape(len(expected), -1), axis=1)).max())


def _print_lengths(texts: list[list[int]], cut: int) -> None:
    shares = (0, 10, 25, 50, 75, 90, 100)
    found = np.percentile([len(text) for text in texts], shares)
    print(f"{len(texts)} documents, {cut} of them cut; tokens at the percentiles", end=" ")
    print(", ".join(f"{share}: {length:.0f}" for share, length in zip(shares, found, strict=True)), flush=True)


if __name__ == "__main__":
    run_command(main)
