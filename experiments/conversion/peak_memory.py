"""`python -m experiments.conversion.peak_memory`: peak host memory of converting a Mistral-7B-shaped model.

Writes a sparse Hugging Face folder (three bfloat16 shards that take no disk space), converts it to Orbax in a
process of its own, and prints that process's peak memory beside the largest shard.
"""

import argparse
import json
import multiprocessing
import resource
import shutil
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from clara_jax.interop.base import layout
from clara_jax.interop.safetensors import INDEX
from clara_jax.models.config import decoder_config_from_hf
from clara_jax.planning.known_models import KNOWN_MODELS

GB = 1e9


def write_sparse_model(folder: Path, config: dict[str, Any], shards: int) -> int:
    """A Hugging Face folder of zeros without blocks on disk; returns the size of its largest shard in bytes."""
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = layout(decoder_config_from_hf(config))
    sizes = [2 * int(np.prod(tensor.shape)) for tensor in tensors]
    per_shard, shard, filled = sum(sizes) / shards, 0, 0
    members: list[list[int]] = [[] for _ in range(shards)]
    for number, size in enumerate(sizes):
        shard = min(int(filled / per_shard), shards - 1)
        members[shard].append(number)
        filled += size
    where, largest = {}, 0
    for shard, numbers in enumerate(members, 1):
        name, header, offset = f"model-{shard:05}-of-{shards:05}.safetensors", {}, 0
        for number in numbers:
            tensor, end = tensors[number], offset + sizes[number]
            header[tensor.name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, end]}
            where[tensor.name], offset = name, end
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + offset)
        largest = max(largest, offset)
    (folder / INDEX).write_text(json.dumps({"weight_map": where}), encoding="utf-8")
    return largest


def convert(source: str, out: str, result: Any) -> None:
    """Convert in this process and report the memory that it took."""
    from clara_jax.convert import convert_base

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    convert_base(source, Path(out))
    result.put((before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, time.perf_counter() - start))


def main() -> None:
    """Make the model, convert it, print the peak."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=3)
    shards = parser.parse_args().shards
    folder = Path(tempfile.mkdtemp())
    try:
        source = folder / "model"
        source.mkdir()
        largest = write_sparse_model(source, KNOWN_MODELS["mistralai/Mistral-7B-Instruct-v0.2"], shards)
        context = multiprocessing.get_context("spawn")
        result = context.Queue()
        process = context.Process(target=convert, args=(str(source), str(folder / "converted"), result))
        process.start()
        before, peak, seconds = result.get()
        process.join()
    finally:
        shutil.rmtree(folder)
    print(f"largest of {shards} shards {largest / GB:.2f} GB, bound (twice that) {2 * largest / GB:.2f} GB")
    print(f"peak host memory {peak / GB:.2f} GB ({before / GB:.2f} GB before reading), {seconds:.0f} s")


if __name__ == "__main__":
    main()
