"""Hugging Face safetensors folders, read and written one tensor at a time.

Tensors are read with plain file reads into fresh memory, not through a memory map, so that the host's peak
memory is that of one tensor whatever the size of the shard.
"""

import dataclasses
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from clara_jax.checked_json import read_object
from clara_jax.errors import fail

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: file, element type, shape, and first byte in the file."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The tensor, in memory of its own."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            values = np.fromfile(file, self.dtype, math.prod(self.shape))
        return values.reshape(self.shape)


def open_folder(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of `model.safetensors`, or of the shards that the index names; no data is read.

    Raises `UserError` for a missing, truncated or malformed file, and for an index that disagrees with its
    shards.
    """
    index = folder / INDEX
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            fail(
                f"{folder} has neither model.safetensors nor {INDEX}",
                "Point at a Hugging Face model folder in the safetensors format",
            )
        return open_file(single)
    where = read_object(index, "Download the file again").get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(shard, str) for shard in where.values()):
        fail(f"{index} has no 'weight_map' from tensor names to file names", "Download the file again")
    entries: dict[str, TensorEntry] = {}
    for shard in sorted(set(where.values())):
        entries.update(open_file(folder / shard))
    missing = sorted(set(where) - set(entries))
    if missing:
        fail(
            f"{index} names {len(missing)} tensors that its shards do not hold ({missing[0]}, ...)",
            "Download the model again",
        )
    return entries


def open_file(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, from its header."""
    if not path.exists():
        fail(f"{path} does not exist", "Download the model again; a shard is missing")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if 8 + length > size:
            fail(f"{path} is truncated ({size} bytes, its header alone needs more)", "Download the file again")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            header = None
    if not isinstance(header, dict):
        fail(f"{path} is not a safetensors file (its header is not a JSON object)", "Download the file again")
    header.pop("__metadata__", None)
    return {name: _entry(path, name, fields, 8 + length, size) for name, fields in header.items()}


def _entry(path: Path, name: str, fields: Any, data: int, size: int) -> TensorEntry:
    """One checked entry of a header; `data` is where the file's data begin, `size` the file's size."""
    fields = fields if isinstance(fields, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or not isinstance(dtype, str):
        fail(f"{path}: the header's entry for tensor '{name}' is malformed", "Download the file again")
    if dtype not in DTYPES:
        fail(f"{path}: tensor '{name}' has type {dtype}", f"Convert it to one of {', '.join(DTYPES)}")
    begin, end = offsets
    entry = TensorEntry(path, np.dtype(DTYPES[dtype]), tuple(shape), data + begin)
    if end - begin != entry.nbytes:
        fail(
            f"{path}: tensor '{name}' of shape {list(entry.shape)} has {end - begin} bytes",
            "Download the file again",
        )
    if data + end > size:
        fail(
            f"{path} is truncated: it has {size} bytes and tensor '{name}' ends at {data + end}",
            "Download the file again",
        )
    return entry


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Name, element type and shape of a tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(path: Path, specs: list[TensorSpec], tensors: Iterator[np.ndarray]) -> None:
    """Write one safetensors file; `tensors` yields the data of `specs`, in their order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for spec, tensor in zip(specs, tensors, strict=True):
            if tensor.shape != spec.shape or tensor.dtype != spec.dtype:
                raise ValueError(f"{spec.name}: {tensor.dtype}{tensor.shape} is not {spec.dtype}{spec.shape}")
            np.ascontiguousarray(tensor).tofile(file)


def write_folder(
    folder: Path, specs: list[TensorSpec], tensors: Iterator[np.ndarray], shard_bytes: int = 5_000_000_000
) -> None:
    """Write a Hugging Face weights folder, cut into shards of at most `shard_bytes` with an index."""
    shards: list[list[TensorSpec]] = [[]]
    for spec in specs:
        if shards[-1] and sum(s.nbytes for s in shards[-1]) + spec.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(spec)
    if len(shards) == 1:
        write_file(folder / "model.safetensors", specs, tensors)
        return
    where = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(folder / name, shard, (next(tensors) for _ in shard))
        where.update({spec.name: name for spec in shard})
    index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs)}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
