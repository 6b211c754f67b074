"""`python -m experiments.search`: exact cosine top-5 beside FAISS `IndexFlatIP` and NumPy, on the same vectors.

Vectors are drawn from a seed; FAISS and NumPy get them normalised, so that their inner product is the cosine. All three
hold them in memory and run in turn, so many threads as the machine has cores. Printed are medians with both quartiles,
and in brackets the fastest of the repeats: on a machine that others use too, FAISS's threads wait for one another and
lose more than ours, and only the fastest times can be compared. Ids must agree, but for cosines that differ by less
than 1e-6.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import ml_dtypes
import numpy as np

from clara_jax.retrieval.search import place_blocks, search_placed
from clara_jax.sharding import MeshConfig, make_mesh

K = 5
Search = Callable[[np.ndarray], np.ndarray]


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memories", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    faiss.omp_set_num_threads(os.cpu_count() or 1)
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((options.memories, options.width), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = rng.standard_normal((max(options.batches), options.width), dtype=np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    sides = _sides(vectors)
    figures = []
    print(f"{options.memories} x {options.width}\n\n| batch | side | ms | times FAISS's speed |\n|---|---|---|---|")
    for batch in options.batches:
        asked = queries[:batch]
        found = {name: search(asked) for name, search in sides.items()}
        for name in ("FAISS IndexFlatIP", "NumPy"):
            _require_same(found["clara_jax float32"], found[name], asked, vectors)
        taken: dict[str, list[float]] = {name: [] for name in sides}
        for repeat in range(options.repeats):
            for name in list(sides)[:: 1 if repeat % 2 else -1]:
                start = time.perf_counter()
                sides[name](asked)
                taken[name].append(1e3 * (time.perf_counter() - start))
        of_faiss = taken["FAISS IndexFlatIP"]
        for name, times in taken.items():
            same = float(np.mean(found[name] == found["clara_jax float32"]))
            figure = {
                "batch": batch,
                "side": name,
                "median_ms": float(np.median(times)),
                "quartiles_ms": np.percentile(times, [25, 75]).tolist(),
                "fastest_ms": min(times),
                "times_faiss": float(np.median(of_faiss) / np.median(times)),
                "times_faiss_fastest": min(of_faiss) / min(times),
                "same_ids": same,
            }
            figures.append(figure)
            low, high = figure["quartiles_ms"]
            print(f"| {batch} | {name} | {figure['median_ms']:.1f} [{low:.1f}, {high:.1f}] ", end="")
            print(f"({figure['fastest_ms']:.1f}) ", end="")
            print(f"| {figure['times_faiss']:.2f} ({figure['times_faiss_fastest']:.2f}), ids {same:.1%} the same |")
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        options.json.write_text(json.dumps({"settings": settings, "figures": figures}, indent=1))


def _sides(vectors: np.ndarray) -> dict[str, Search]:
    """Each side's ids of the best K of some queries."""
    width, mesh = vectors.shape[1], make_mesh(MeshConfig())
    index = faiss.IndexFlatIP(width)
    index.add(vectors)

    def by_numpy(queries: np.ndarray) -> np.ndarray:
        scores = queries @ vectors.T
        best = np.argpartition(-scores, K, axis=1)[:, :K]
        order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1, kind="stable")
        return np.take_along_axis(best, order, axis=1)

    def ours(memories: np.ndarray) -> Search:
        placed = list(place_blocks([memories], width, mesh))
        return lambda queries: search_placed(queries, placed, K, mesh).indices

    scale = np.abs(vectors).max(axis=1, keepdims=True) / 127
    return {
        "clara_jax float32": ours(vectors),
        "clara_jax bfloat16": ours(vectors.astype(ml_dtypes.bfloat16)),
        "clara_jax int8": ours(np.rint(vectors / scale).astype(np.int8)),
        "FAISS IndexFlatIP": lambda queries: index.search(queries, K)[1],
        "NumPy": by_numpy,
    }


def _require_same(mine: np.ndarray, other: np.ndarray, queries: np.ndarray, vectors: np.ndarray) -> None:
    """Raise unless ids are the same wherever float64 cosines tell them apart."""
    for row, rank in zip(*np.nonzero(mine != other), strict=True):
        ids = mine[row, rank], other[row, rank]
        a, b = (vectors[i].astype(np.float64) @ queries[row].astype(np.float64) for i in ids)
        if abs(a - b) > 1e-6:
            raise SystemExit(f"query {row}: ids {ids} at rank {rank} have the cosines {a} and {b}")


if __name__ == "__main__":
    main()
