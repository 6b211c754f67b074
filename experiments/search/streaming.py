"""`python -m experiments.search.streaming`: the memory that searching a store takes which is larger than a limit.

Writes a store of random bfloat16 memories in segments, then searches it in a process of its own, streamed from disk,
and prints by how much that process's peak memory grew while it searched.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from clara_jax.corpus.passages import Passage
from clara_jax.retrieval.index import MemoryIndex
from clara_jax.retrieval.manifest import StoreSettings
from clara_jax.retrieval.search import search
from clara_jax.retrieval.store import MemoryStore
from clara_jax.retrieval.writer import StoreWriter

MEMORY, HIDDEN = 8, 512


def main() -> None:
    """Write the store, search it, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=2048, help="size of the store")
    parser.add_argument("--limit", type=int, default=256, help="megabytes that searching may take")
    parser.add_argument("--search", type=Path, help="(the store, for the process that searches)")
    options = parser.parse_args()
    if options.search:
        _search(options.search, options.limit << 20)
        return
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        _write(store, options.megabytes)
        said = subprocess.run(
            [sys.executable, "-m", "experiments.search.streaming", "--search", str(store), f"--limit={options.limit}"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    grown = float(said.split()[0])
    print(f"store of {options.megabytes} MB: {said.strip()}")
    print(f"{'within' if grown <= options.limit else 'OVER'} the limit of {options.limit} MB")


def _write(location: Path, megabytes: int) -> None:
    writer = StoreWriter(location, StoreSettings("random", MEMORY, HIDDEN, "bfloat16", 256, 0))
    rng, added = np.random.default_rng(0), []
    rows = 64 * 1024 * 1024 // (2 * MEMORY * HIDDEN)
    for number in range(megabytes // 64):
        passages = [Passage(f"{number}-{row}", 0, 0, 1, "", "x") for row in range(rows)]
        memories = rng.standard_normal((rows, MEMORY, HIDDEN), dtype=np.float32)
        added.append((writer.write(f"{number}", passages, memories), {p.document: bytes(16) for p in passages}))
    writer.commit(added, [])


def _search(location: Path, limit: int) -> None:
    queries = np.random.default_rng(1).standard_normal((8, MEMORY, HIDDEN), dtype=np.float32)
    index = MemoryIndex([MemoryStore.open(location)], device_bytes=0, block_bytes=limit // 64)
    # What compiling needs is not counted: one block of zeros has been searched before.
    rows = (limit // 24) // index.stores[0].row_bytes
    search(queries.reshape(8, -1), [np.zeros((rows, MEMORY * HIDDEN), ml_dtypes.bfloat16)], 5, block_rows=rows)
    before = _peak()
    start = time.perf_counter()
    index.search(queries, 5)
    print(f"{_peak() - before:.0f} MB more at the peak, {time.perf_counter() - start:.1f} s for 8 queries")


def _peak() -> float:
    """The peak of this process's resident memory, MB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main()
