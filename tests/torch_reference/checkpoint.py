"""The checkpoint layout: ``adapters.pth``, first and last layers, ``config.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from .lora import DECODER, ENCODER, QUERY, load_adapter
from .model import ClaraReference

# Attributes of the configuration that play no part in the computation.
_IDLE_SETTINGS: dict[str, Any] = {
    "_attn_implementation_autoset": True,
    "ae_mode": "token",
    "auto_map": {"AutoConfig": "modeling_clara.CLaRaConfig", "AutoModel": "modeling_clara.CLaRa"},
    "compr_base_model_name": "mistralai/Mistral-7B-Instruct-v0.2",
    "compr_every_n_layer": None,
    "compr_linear_type": "concat",
    "compr_mlp_hidden_dim": 8096,
    "compr_model_name": None,
    "compr_n_layers": 5,
    "compr_rms_norm": False,
    "compr_use_mlp": False,
    "device_map": None,
    "different_mem_tokens": True,
    "kbtc_training": False,
    "load_adapters": True,
    "load_pretrained_checkpoint": False,
    "lora": True,
    "lora_compressor": False,
    "max_new_tokens": 128,
    "model_type": "CLaRa",
    "optimize_mem_tokens": True,
    "pure_inference": False,
    "quantization": "no",
    "sep": True,
    "stage2_retrieval_top_n": 1,
    "training_form": "both_separately",
    "transformers_version": transformers.__version__,
}


def make_settings(base: str, stage: str, case: dict[str, Any], top_k: int) -> dict[str, Any]:
    """A checkpoint's ``config.json`` for a case configuration."""
    settings = dict(_IDLE_SETTINGS)
    settings.update(
        attn_implementation="flash_attention_2" if stage == "stage1" else None,
        compr_rate=case["compress_rate"],
        decoder_model_name=base,
        doc_max_length=case["doc_max_length"],
        generation_top_k=top_k,
        lora_r=case["lora_r"],
        lora_r_compressor=case["lora_r"],
        training_stage=stage,
    )
    return dict(sorted(settings.items()))


def save(model: ClaraReference, folder: Path, created: list[str]) -> None:
    """Write a checkpoint; ``created`` adapters get the extra table copies."""
    folder.mkdir(parents=True, exist_ok=True)
    adapters = {}
    for adapter in sorted(model.adapters):
        tensors = {name: p.detach() for name, p in model.parameters_of(adapter).items()}
        if adapter in created:
            tensors["model.embed_tokens.weight"] = model.embedding.detach()
            tensors["lm_head.weight"] = model.head.detach()
        adapters[adapter] = tensors
    torch.save(adapters, folder / "adapters.pth")
    outer = {"model.embed_tokens.weight": model.embedding}
    if model.head is not model.embedding:
        outer["lm_head.weight"] = model.head
    torch.save(outer, folder / "decoder_first_last_layers.pth")
    text = json.dumps(model.settings, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


@torch.no_grad()
def load(root: Path, checkpoint: str, adapters: list[str] | None = None) -> ClaraReference:
    """Model of ``root / checkpoint`` with the named adapters (default: all)."""
    folder = root / checkpoint
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = ClaraReference(root, settings)
    outer = torch.load(folder / "decoder_first_last_layers.pth", weights_only=True)
    model.embedding.copy_(outer["model.embed_tokens.weight"])
    if "lm_head.weight" in outer:
        model.head.copy_(outer["lm_head.weight"])
    stored = torch.load(folder / "adapters.pth", weights_only=True)
    for adapter in stored if adapters is None else adapters:
        model.add_adapter(adapter)
        load_adapter(model.decoder, adapter, stored[adapter])
    model.set_trainable([])
    return model


@torch.no_grad()
def load_for_stage(root: Path, checkpoint: str, stage: str, pure_inference: bool = False) -> ClaraReference:
    """Loading as training does it: some adapters are skipped and started anew."""
    stored = list(torch.load(root / checkpoint / "adapters.pth", weights_only=True))
    if pure_inference:
        return load(root, checkpoint, stored)
    skipped = {
        "stage1": [QUERY],
        "stage1_2": [DECODER, QUERY],
        "stage2": [],
        "stage2_reasoning": [DECODER],
    }[stage]
    model = load(root, checkpoint, [adapter for adapter in stored if adapter not in skipped])
    if DECODER in skipped:
        model.add_adapter(DECODER)
    if stage == "stage2" and QUERY not in stored:
        model.add_adapter(QUERY)
        load_adapter(model.decoder, QUERY, model.parameters_of(ENCODER))
    return model
