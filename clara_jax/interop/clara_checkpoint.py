"""The reference's CLaRa checkpoints, in and out: `config.json`, `adapters.pth`, `decoder_first_last_layers.pth`."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from clara_jax.checked_json import positive_int, read_object
from clara_jax.errors import UserError, fail
from clara_jax.interop import names
from clara_jax.interop.adapters import adapter_from_tensors, adapter_to_tensors
from clara_jax.interop.pth import read_pth, write_pth
from clara_jax.models.config import DecoderConfig
from clara_jax.models.lora import Adapter
from clara_jax.models.roles import Role

REFERENCE_NAMES: dict[Role, str] = {
    "compressor": "encoder_adapter",
    "query_reasoner": "query_reasoner_adapter",
    "generator": "decoder_adapter",
}
CONFIG, ADAPTERS, TABLES = "config.json", "adapters.pth", "decoder_first_last_layers.pth"


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What a checkpoint's `config.json` says of the model. Lengths in tokens.

    `base_model` is a folder (relative to the checkpoint's parent, as the reference writes it, or to the
    working directory) or a hub id. Keys that only the reference reads are kept in `other`.
    """

    base_model: str
    doc_max_length: int
    compression_rate: int
    lora_rank: int
    top_k: int = 1
    training_stage: str = "stage1"
    other: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def num_memory(self) -> int:
        """Memory tokens per document."""
        return self.doc_max_length // self.compression_rate


# Field here -> key in the reference's config.json.
_KEYS = {
    "base_model": "decoder_model_name",
    "doc_max_length": "doc_max_length",
    "compression_rate": "compr_rate",
    "lora_rank": "lora_r",
    "top_k": "generation_top_k",
    "training_stage": "training_stage",
}
# Settings of the reference that change what is computed, and the only values computed here.
_FIXED = {
    "lora": True,
    "lora_compressor": False,
    "compr_model_name": None,
    "compr_use_mlp": False,
    "different_mem_tokens": True,
    "sep": True,
    "training_form": "both_separately",
    "quantization": "no",
    "kbtc_training": False,
}
_DEFAULTS = {
    "ae_mode": "token",
    "attn_implementation": None,
    "auto_map": {"AutoConfig": "modeling_clara.CLaRaConfig", "AutoModel": "modeling_clara.CLaRa"},
    "compr_base_model_name": "mistralai/Mistral-7B-Instruct-v0.2",
    "compr_every_n_layer": None,
    "compr_linear_type": "concat",
    "compr_mlp_hidden_dim": 8096,
    "compr_n_layers": 5,
    "compr_rms_norm": False,
    "device_map": None,
    "load_adapters": True,
    "load_pretrained_checkpoint": False,
    "max_new_tokens": 128,
    "model_type": "CLaRa",
    "optimize_mem_tokens": True,
    "pure_inference": False,
    "stage2_retrieval_top_n": 1,
}


def read_config(folder: Path) -> CheckpointConfig:
    """Read a checkpoint's `config.json`. Raises `UserError` for a setting that is not computed here."""
    path = folder / CONFIG
    fields = read_object(path, "Point at a CLaRa checkpoint folder")
    if fields.get("model_type") != "CLaRa":
        fail(
            f"{path} has model_type '{fields.get('model_type')}', not 'CLaRa'",
            "Point at a CLaRa checkpoint folder, not at a base model",
        )
    for key, value in _FIXED.items():
        if fields.get(key, value) != value:
            fail(f"{path}: '{key}' is {fields[key]!r}; only {value!r} is supported", "Use another checkpoint")
    if not isinstance(fields.get("decoder_model_name"), str):
        fail(f"{path}: key 'decoder_model_name' is missing", "Copy the checkpoint again")
    try:
        for field in ("doc_max_length", "compression_rate", "lora_rank"):
            positive_int(fields, _KEYS[field])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    known = {field: fields[key] for field, key in _KEYS.items() if key in fields}
    other = {key: value for key, value in fields.items() if key not in _KEYS.values()}
    return CheckpointConfig(**known, other=other)


def read_adapters(folder: Path, config: DecoderConfig, rank: int) -> dict[Role, Adapter]:
    """The adapters that `adapters.pth` holds, by role."""
    path = folder / ADAPTERS
    content = read_pth(path)
    roles = {name: role for role, name in REFERENCE_NAMES.items()}
    unknown = sorted(set(content) - set(roles))
    if unknown:
        fail(f"{path} holds an adapter '{unknown[0]}'", f"Keep only {', '.join(sorted(roles))}")
    if "encoder_adapter" not in content:
        fail(f"{path} holds no 'encoder_adapter'", "Use a checkpoint that has been through stage 1")
    for name, tensors in content.items():
        if not isinstance(tensors, dict):
            fail(f"{path}['{name}'] is a tensor, not an adapter's dict of tensors", "Copy the checkpoint again")
        for key, tensor in tensors.items():
            _require_weights(f"{path}['{name}']", key, tensor)
    return {
        roles[name]: adapter_from_tensors(tensors, config, rank, f"{path}['{name}']")
        for name, tensors in content.items()
    }


def read_tables(folder: Path, config: DecoderConfig, vocab_size: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Embedding table and head, [vocabulary, hidden] each; the head is None where it is tied."""
    path = folder / TABLES
    content = read_pth(path)
    expected = [names.EMBED] if config.tied_head else [names.EMBED, names.HEAD]
    for name in expected:
        if name not in content:
            fail(f"{path}: tensor '{name}' is missing", "Copy the checkpoint again")
        _require_weights(str(path), name, content[name])
        if content[name].shape != (vocab_size, config.hidden_size):
            fail(
                f"{path}: '{name}' has shape {list(content[name].shape)}, the tokenizer with CLaRa's tokens and "
                f"the base model need {[vocab_size, config.hidden_size]}",
                "Check that base model, tokenizer and compression rate are the checkpoint's own",
            )
    extra = sorted(set(content) - {names.EMBED, names.HEAD})
    if extra:
        fail(f"{path}: unexpected tensor '{extra[0]}'", "Copy the checkpoint again")
    return content[names.EMBED], None if config.tied_head else content[names.HEAD]


def _require_weights(where: str, name: str, value: Any) -> None:
    if not isinstance(value, np.ndarray):
        fail(f"{where}: '{name}' is a dict, not a tensor", "Copy the checkpoint again")
    if value.dtype.kind in "iub":
        fail(f"{where}: '{name}' has element type {value.dtype}", "Save floating-point weights")


def write_checkpoint(
    folder: Path,
    checkpoint: CheckpointConfig,
    config: DecoderConfig,
    adapters: dict[Role, Adapter],
    embed: np.ndarray,
    head: np.ndarray | None,
) -> None:
    """Write a checkpoint that the reference's loader reads key by key. Needs the extra `convert`."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {**_DEFAULTS, **_FIXED, **checkpoint.other}
    fields |= {key: getattr(checkpoint, field) for field, key in _KEYS.items()}
    fields["lora_r_compressor"] = checkpoint.lora_rank
    tables = {names.EMBED: embed} if head is None else {names.EMBED: embed, names.HEAD: head}
    write_pth(folder / TABLES, tables)
    write_pth(
        folder / ADAPTERS,
        {REFERENCE_NAMES[role]: adapter_to_tensors(adapter, config) for role, adapter in adapters.items()},
    )
    (folder / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True), encoding="utf-8")
