"""One adapter between this project's stacked tree and the names of PEFT and of the reference's checkpoints."""

import json
from pathlib import Path

import jax
import numpy as np

from clara_jax.errors import fail
from clara_jax.interop import names
from clara_jax.interop.safetensors import TensorSpec, write_file
from clara_jax.models.config import DecoderConfig
from clara_jax.models.lora import Adapter, LoraConfig, adapter_shapes


def adapter_to_tensors(adapter: Adapter, config: DecoderConfig) -> dict[str, np.ndarray]:
    """`{"model.layers.0.self_attn.q_proj.lora_A.weight": [rank, in], ...lora_B...: [out, rank]}`."""
    host = jax.tree.map(np.asarray, adapter["layers"])
    tensors = {}
    for layer in range(config.num_layers):
        for site in config.adapter_sites:
            module = names.site_name(layer, site)
            tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(host[site]["a"][layer].T)
            tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(host[site]["b"][layer].T)
    return tensors


def adapter_from_tensors(tensors: dict[str, np.ndarray], config: DecoderConfig, rank: int, where: str) -> Adapter:
    """The stacked adapter of a dict of named tensors.

    The full copies of the embedding table and the head that the reference stores inside freshly made
    adapters are skipped. `where` names the file for errors: any missing, extra or misshapen tensor.
    """
    shapes = adapter_shapes(config, rank)["layers"]
    tensors = {name: t for name, t in tensors.items() if name not in (names.EMBED, names.HEAD)}
    layers: Adapter = {}
    for site, leaves in shapes.items():
        layers[site] = {}
        for leaf, suffix in (("a", "lora_A.weight"), ("b", "lora_B.weight")):
            pieces = []
            for layer in range(config.num_layers):
                name = f"{names.site_name(layer, site)}.{suffix}"
                if name not in tensors:
                    fail(f"{where}: tensor '{name}' is missing", "Check that the checkpoint fits the base model")
                piece, expected = tensors.pop(name), leaves[leaf].shape[1:]
                if piece.T.shape != expected:
                    fail(
                        f"{where}: '{name}' has shape {list(piece.shape)}, "
                        f"rank {rank} on this base model needs {list(expected[::-1])}",
                        "Check 'lora_r' in the checkpoint's config.json and the base model",
                    )
                pieces.append(piece.T)
            layers[site][leaf] = np.stack(pieces).astype(np.float32)
    if tensors:
        fail(
            f"{where}: {len(tensors)} tensors fit no linear layer of the base model, "
            f"the first is '{next(iter(tensors))}'",
            "Check that the checkpoint fits the base model",
        )
    return {"layers": layers}


def write_peft(folder: Path, adapter: Adapter, config: DecoderConfig, lora: LoraConfig, base: str) -> None:
    """Write one adapter as a PEFT folder (`adapter_config.json`, `adapter_model.safetensors`)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.{name}": t for name, t in adapter_to_tensors(adapter, config).items()}
    specs = [TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    write_file(folder / "adapter_model.safetensors", specs, iter(tensors.values()))
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "target_modules": sorted(config.adapter_sites),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields, indent=2), encoding="utf-8")
