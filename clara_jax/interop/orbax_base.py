"""A base model as Orbax: one small checkpoint per layer, so that neither writing nor reading holds more than one.

folder/config.json, tokenizer files ...   as in the Hugging Face folder
folder/orbax/embed, layer_00000, ..., final_norm, head
folder/orbax/base.json                    fingerprint of the weights
"""

import itertools
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from clara_jax.errors import fail
from clara_jax.interop.safetensors import INDEX
from clara_jax.models.config import DecoderConfig

ORBAX, MANIFEST = "orbax", "base.json"
Piece = tuple[tuple[str, ...], int | None, Any]


def is_orbax_base(folder: Path) -> bool:
    """Whether `folder` was made by `write_orbax_base`."""
    return (folder / ORBAX / MANIFEST).exists()


def copy_companions(source: Path, out: Path) -> None:
    """Copy what stands beside a base model's weights: config and tokenizer files."""
    for pattern in ("*.json", "*.jinja"):
        for file in source.glob(pattern):
            if file.name != INDEX:
                shutil.copyfile(file, out / file.name)


def write_orbax_base(source: Path, out: Path, pieces: Iterable[Piece], fingerprint: str) -> None:
    """Write `pieces` (leaf path, layer, values) layer by layer, and copy config and tokenizer files of `source`."""
    copy_companions(source, out)
    (out / ORBAX).mkdir()
    names = []
    with ocp.StandardCheckpointer() as checkpointer:
        for name, group in itertools.groupby(pieces, key=_group):
            values = {"/".join(path): np.ascontiguousarray(value) for path, _, value in group}
            checkpointer.save((out / ORBAX / name).absolute(), values)
            checkpointer.wait_until_finished()
            names.append(name)
    manifest = {"fingerprint": fingerprint, "groups": names}
    (out / ORBAX / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def read_orbax_pieces(folder: Path, config: DecoderConfig) -> Iterator[Piece]:
    """(leaf path, layer, values) of every leaf of the folder, group by group."""
    groups = read_manifest(folder)["groups"]
    layers = sum(name.startswith("layer_") for name in groups)
    if layers != config.num_layers:
        fail(f"{folder / ORBAX} holds {layers} layers, config.json asks for {config.num_layers}", "Convert again")
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        for name in groups:
            path = (folder / ORBAX / name).absolute()
            if not path.is_dir():
                fail(f"{path} does not exist", "Copy the folder again, or convert the base model again")
            shapes = checkpointer.metadata(path).item_metadata.tree
            abstract = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), shapes)
            layer = int(name.removeprefix("layer_")) if name.startswith("layer_") else None
            for leaf, values in checkpointer.restore(path, abstract).items():
                yield tuple(leaf.split("/")), layer, np.asarray(values)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Fingerprint and group names of a folder made by `write_orbax_base`."""
    return json.loads((folder / ORBAX / MANIFEST).read_text(encoding="utf-8"))


def _group(piece: Piece) -> str:
    path, layer, _ = piece
    return path[0] if layer is None else f"layer_{layer:05}"
