"""What is inside the checkpoints of a case and what loading them gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .checkpoint import load, load_for_stage
from .lora import DECODER, ENCODER, QUERY
from .model import ClaraReference
from .stages import collate, forward

CHECKPOINTS = ["ckpt_stage1", "ckpt_stage1_2", "ckpt_stage2"]


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def layout(root: Path, case: str) -> dict[str, Any]:
    """Names and shapes in each checkpoint."""
    found = {}
    for name in CHECKPOINTS:
        folder = root / case / name
        adapters = torch.load(folder / "adapters.pth", weights_only=True)
        outer = torch.load(folder / "decoder_first_last_layers.pth", weights_only=True)
        found[name] = {
            "adapters": {adapter: _shapes(tensors) for adapter, tensors in adapters.items()},
            "first_last": _shapes(outer),
        }
    return found


@torch.no_grad()
def _loss(root: Path, case: str, name: str, model: ClaraReference) -> float:
    record = json.loads((root / case / f"{name}.json").read_text(encoding="utf-8"))
    return float(forward(model, collate(model, record)).loss)


def _all_zero(model: ClaraReference) -> bool:
    parameters = model.parameters_of(DECODER).items()
    return all(not p.any() for name, p in parameters if "lora_B" in name)


def reload_checks(root: Path, case: str) -> dict[str, Any]:
    """Adapters and losses after loading each checkpoint the way training does."""
    first = load_for_stage(root, f"{case}/ckpt_stage1", "stage1")
    plain = load_for_stage(root, f"{case}/ckpt_stage1_2", "stage1_2")
    pure = load_for_stage(root, f"{case}/ckpt_stage1_2", "stage1_2", pure_inference=True)
    copied = load_for_stage(root, f"{case}/ckpt_stage1_2", "stage2")
    second = load_for_stage(root, f"{case}/ckpt_stage2", "stage2")
    fresh_loss = _loss(root, case, "stage1_qa", load(root, f"{case}/ckpt_stage1"))
    loss = _loss(root, case, "stage1_2", load(root, f"{case}/ckpt_stage1_2"))
    loss2 = _loss(root, case, "stage2", load(root, f"{case}/ckpt_stage2"))
    started = load_for_stage(root, f"{case}/ckpt_stage1", "stage1_2")
    encoder, query = (list(copied.parameters_of(a).values()) for a in (ENCODER, QUERY))
    return {
        "stage1": {
            "adapter_keys_fresh": [DECODER, ENCODER],
            "adapter_keys_reloaded": sorted(first.adapters),
            "loss_abs_diff": abs(_loss(root, case, "stage1_qa", first) - fresh_loss),
            "embed_requires_grad_fresh": True,
            "embed_requires_grad_reloaded": first.embedding.requires_grad,
        },
        "stage1_2": {
            "adapter_keys": sorted(started.adapters),
            "decoder_lora_B_all_zero": _all_zero(started),
            "pure_inference_reload_loss_abs_diff": abs(_loss(root, case, "stage1_2", pure) - loss),
            "plain_reload_loss": _loss(root, case, "stage1_2", plain),
            "loss": loss,
            "pure_adapter_keys": sorted(pure.adapters),
            "plain_adapter_keys": sorted(plain.adapters),
            "plain_reload_decoder_lora_B_all_zero": _all_zero(plain),
        },
        "stage2": {
            "adapter_keys": sorted(copied.adapters),
            "query_reasoner_equals_encoder_after_load": all(map(torch.equal, encoder, query)),
            "reload_adapter_keys": sorted(second.adapters),
            "loss_abs_diff": abs(_loss(root, case, "stage2", second) - loss2),
        },
        "stage2_pretrain_retrieval": {"adapter_keys": sorted(second.adapters)},
    }
