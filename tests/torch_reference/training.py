"""Optimizer steps and learning rate schedules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .model import ClaraReference
from .stages import OPTIMISED, WITH_GRADIENT, StageBatch, StageOutput, forward


def learning_rate(name: str, lr: float, warmup: int, total: int, step: int) -> float:
    """Rate used at optimizer step ``step`` (counted from 0)."""
    if name == "constant":
        return lr
    if step < warmup:
        return lr * step / max(1, warmup)
    if name == "cosine_with_min_lr":
        progress = (step - warmup) / max(1, total - warmup)
        return lr * (0.1 + 0.9 * max(0.0, 0.5 * (1 + math.cos(math.pi * progress))))
    raise ValueError(name)


def prepare(model: ClaraReference, stage: str) -> list[nn.Parameter]:
    """Parameters handed to the optimizer; a new stage1 model also trains memory rows."""
    model.set_trainable(OPTIMISED[stage], memory_rows=stage == "stage1")
    chosen = [p for p in model.parameters() if p.requires_grad]
    kept = {id(p) for a in WITH_GRADIENT[stage] for p in model.parameters_of(a).values()}
    for adapter in OPTIMISED[stage]:
        for parameter in model.parameters_of(adapter).values():
            parameter.requires_grad_(id(parameter) in kept)
    return chosen


def gradient_norm(parameters: list[nn.Parameter]) -> torch.Tensor:
    """Global L2 norm over the gradients that exist."""
    return torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()


def train_steps(
    model: ClaraReference, batch: StageBatch, parameters: list[nn.Parameter], steps: int = 3, lr: float = 1e-4
) -> tuple[list[StageOutput], list[torch.Tensor]]:
    """The same batch ``steps`` times; outputs before each step and after the last."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    outputs, norms = [], []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        output = forward(model, batch)
        output.total.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
        optimizer.step()
        outputs.append(output)
    with torch.no_grad():
        outputs.append(forward(model, batch))
    return outputs, norms


def optimizer_summary(model: ClaraReference, stage: str) -> dict[str, Any]:
    """Names of what is trainable when the optimizer is built."""
    marks = tuple(f".{adapter}." for adapter in OPTIMISED[stage])
    names = [n for n, _ in model.named_parameters() if any(mark in n for mark in marks)]
    if stage == "stage1":
        names.append("decoder.model.embed_tokens.weight")
    return {
        "requires_grad_when_optimizer_is_created": sorted(names),
        "embed_tokens_requires_grad": stage == "stage1",
        "lm_head_requires_grad": stage == "stage1" and model.head is model.embedding,
        "lm_head_tied_to_embed": model.head is model.embedding,
    }
