"""Hugging Face base weights into base parameters and back, tensor by tensor.

Reading yields one piece at a time (`read_pieces`), and `load_base` writes each into its place of the stacked
tree on the device: host memory holds one tensor, never a shard.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Int

from clara_jax.errors import fail
from clara_jax.interop import names
from clara_jax.interop.orbax_base import Piece, is_orbax_base, read_manifest, read_orbax_pieces
from clara_jax.interop.safetensors import TensorEntry, TensorSpec, open_folder, write_folder
from clara_jax.models.config import DecoderConfig
from clara_jax.sharding import place

Path_ = tuple[str, ...]
Progress = Callable[[int, int], None]
LeafSharding = Callable[[Path_, tuple[int, ...]], NamedSharding]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One Hugging Face tensor and the leaves it holds.

    `leaves` are paths in the base tree. Several leaves lie one after the other along the first axis, in
    `rows` rows each. `layer` is None for what is not stacked; `transposed` marks matrices.
    """

    name: str
    leaves: tuple[Path_, ...]
    rows: tuple[int, ...]
    columns: int | None
    layer: int | None
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the Hugging Face file."""
        total = sum(self.rows)
        return (total,) if self.columns is None else (total, self.columns)


def layout(config: DecoderConfig) -> list[Tensor]:
    """Every tensor of a base model's files, in the order in which they are written."""
    hidden = config.hidden_size
    tensors = [Tensor(names.EMBED, (("embed",),), (config.vocab_size,), hidden, None, False)]
    for layer in range(config.num_layers):
        for site, targets in config.adapter_sites.items():
            size_in = config.projections[targets[0]][0]
            rows = tuple(config.projections[name][1] for name in targets)
            module = names.site_name(layer, site)
            kernels = tuple(("layers", name, "kernel") for name in targets)
            tensors.append(Tensor(f"{module}.weight", kernels, rows, size_in, layer, True))
            if targets[0] in config.biased:
                biases = tuple(("layers", name, "bias") for name in targets)
                tensors.append(Tensor(f"{module}.bias", biases, rows, None, layer, False))
        for norm in names.block_norms(config):
            size = config.head_dim if norm in ("q_norm", "k_norm") else hidden
            name = names.norm_name(layer, norm)
            tensors.append(Tensor(name, (("layers", norm),), (size,), None, layer, False))
    tensors.append(Tensor(names.FINAL_NORM, (("final_norm",),), (hidden,), None, None, False))
    if not config.tied_head:
        tensors.append(Tensor(names.HEAD, (("head",),), (config.vocab_size,), hidden, None, True))
    return tensors


def check_entries(folder: Path, config: DecoderConfig, entries: dict[str, TensorEntry]) -> None:
    """Refuse missing and extra tensors, wrong shapes, and mixed or integer element types, by name."""
    expected = {tensor.name: tensor for tensor in layout(config)}
    missing = [name for name in expected if name not in entries]
    if missing:
        fail(
            f"{folder}: {len(missing)} tensors are missing, the first is '{missing[0]}'",
            "Download the model again, or correct config.json",
        )
    extra = [
        name
        for name in entries
        if name not in expected
        and not name.endswith(names.IGNORED_SUFFIX)
        and not (config.tied_head and name == names.HEAD)
    ]
    if extra:
        fail(
            f"{folder}: {len(extra)} tensors are not part of a {config.family} decoder, the first is '{extra[0]}'",
            "Check that config.json belongs to these weights",
        )
    for name, tensor in expected.items():
        entry = entries[name]
        if entry.shape != tensor.shape:
            fail(
                f"{entry.path}: '{name}' has shape {list(entry.shape)}, config.json asks for {list(tensor.shape)}",
                "Check that config.json belongs to these weights",
            )
        if not jnp.issubdtype(entry.dtype, jnp.floating):
            fail(
                f"{entry.path}: '{name}' has element type {entry.dtype}, weights are floating point",
                "Use an unquantised checkpoint",
            )


def read_pieces(folder: Path, config: DecoderConfig, progress: Progress | None = None) -> Iterator[Piece]:
    """(leaf path, layer, values) for every tensor of the folder, in this project's orientation.

    Values of a matrix may be a transposed view of what the file holds.
    """
    if is_orbax_base(folder):
        yield from read_orbax_pieces(folder, config)
        return
    entries = open_folder(folder)
    check_entries(folder, config, entries)
    tensors = layout(config)
    for number, tensor in enumerate(tensors, 1):
        values = entries[tensor.name].read()
        start = 0
        for leaf, rows in zip(tensor.leaves, tensor.rows, strict=True):
            part = values[start : start + rows]
            yield leaf, tensor.layer, part.T if tensor.transposed else part
            start += rows
        if progress is not None:
            progress(number, len(tensors))


def load_base(
    folder: Path,
    config: DecoderConfig,
    dtype: Any = None,
    vocab_size: int | None = None,
    progress: Progress | None = None,
    sharding: LeafSharding | None = None,
) -> dict[str, Any]:
    """Base parameters of a Hugging Face or converted folder, in `dtype` (None keeps the files' own).

    `sharding` says where each leaf lies, by its path and shape; without it all are on one device. Only one
    tensor at a time is ever whole on a device.

    With `vocab_size`, embedding table and head are cut or grown to that many entries; new entries are the
    mean of the old ones (transformers draws them around it with a spread of 3e-5 of the old ones').
    """
    flat: dict[Path_, Array] = {}
    for leaf, layer, values in read_pieces(folder, config, progress):
        if leaf in (("embed",), ("head",)) and vocab_size is not None:
            values = resize_vocabulary(values, vocab_size, axis=0 if leaf == ("embed",) else 1)
        piece = values if dtype is None else values.astype(dtype, copy=False)
        if layer is None:
            flat[leaf] = jnp.asarray(piece) if sharding is None else place(piece, sharding(leaf, piece.shape))
            continue
        if leaf not in flat:
            shape = (config.num_layers, *piece.shape)
            flat[leaf] = jnp.zeros(shape, piece.dtype, device=sharding and sharding(leaf, shape))
        if piece.dtype != flat[leaf].dtype:
            fail(
                f"{folder}: layer {layer} keeps {'.'.join(leaf)} as {piece.dtype}, "
                f"earlier layers as {flat[leaf].dtype}",
                "Convert the weights to one element type, or name a dtype",
            )
        turned = not piece.flags.c_contiguous  # which devices undo faster than the host
        flat[leaf] = _set_layer(flat[leaf], piece.T if turned else piece, np.int32(layer), turned)
    return unflatten(flat)


@functools.partial(jax.jit, donate_argnums=0, static_argnames="turned")
def _set_layer(stacked: Array, piece: Array, layer: Int[Array, ""], turned: bool) -> Array:
    piece = piece.T if turned else piece
    return jax.lax.dynamic_update_index_in_dim(stacked, piece, layer, axis=0)


def save_base(folder: Path, base: dict[str, Any], config: DecoderConfig, shard_bytes: int = 5_000_000_000) -> None:
    """Write base parameters as Hugging Face safetensors (weights only; config.json is the caller's)."""
    tensors = layout(config)

    def leaf(path: Path_) -> Any:
        return functools.reduce(lambda tree, key: tree[key], path, base)

    def values(tensor: Tensor) -> np.ndarray:
        parts = [leaf(path) if tensor.layer is None else leaf(path)[tensor.layer] for path in tensor.leaves]
        arrays = [np.asarray(part) for part in parts]
        return np.concatenate([part.T if tensor.transposed else part for part in arrays], axis=0)

    specs = [TensorSpec(t.name, np.dtype(leaf(t.leaves[0]).dtype), t.shape) for t in tensors]
    write_folder(folder, specs, (values(tensor) for tensor in tensors), shard_bytes)


def resize_vocabulary(table: np.ndarray, size: int, axis: int) -> np.ndarray:
    """`table` with `size` vocabulary entries along `axis`: cut at the end, or grown by its mean entry."""
    have = table.shape[axis]
    if size <= have:
        return np.take(table, np.arange(size), axis=axis)
    mean = table.astype(np.float32).mean(axis=axis, keepdims=True).astype(table.dtype)
    return np.concatenate([table, np.repeat(mean, size - have, axis=axis)], axis=axis)


def base_fingerprint(folder: Path) -> str:
    """Identifies a base model: names, types, shapes and a sample of the bytes of every tensor, hashed."""
    if is_orbax_base(folder):
        return str(read_manifest(folder)["fingerprint"])
    digest = hashlib.sha256()
    for name, entry in sorted(open_folder(folder).items()):
        digest.update(f"{name} {entry.dtype} {entry.shape}".encode())
        with entry.path.open("rb") as file:
            file.seek(entry.offset)
            digest.update(file.read(min(4096, entry.nbytes)))
    return digest.hexdigest()[:16]


def unflatten(flat: dict[Path_, Any]) -> dict[str, Any]:
    """Nested dict from a dict of paths."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree
