"""Straight-through selection of candidates."""

from __future__ import annotations

import torch
from torch import Tensor


def straight_through_topk(scores: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Selection matrix [B, k, N], one-hot in value and soft in gradient, and indices [B, k].

    Items taken by earlier slots are only lowered by log(1e-8), not removed.
    """
    logits = scores / max(temperature, 1e-6)
    index = logits.topk(k, dim=-1).indices
    hard = torch.nn.functional.one_hot(index, logits.shape[-1]).to(logits.dtype)
    free = torch.ones_like(logits)
    soft = []
    for j in range(k):
        soft.append(torch.softmax(logits + torch.log(free + 1e-8), dim=-1))
        free = free * (1 - hard[:, j])
    weights = torch.stack(soft, dim=1)
    return hard + (weights - weights.detach()), index


def straight_through_top1(scores: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The single-slot variant; its values may be off 0 and 1 by rounding."""
    soft = torch.softmax(scores / max(temperature, 1e-6), dim=-1)
    index = soft.topk(1, dim=-1).indices
    hard = torch.nn.functional.one_hot(index[:, 0], scores.shape[-1]).to(soft.dtype)
    return (hard + soft - soft.detach())[:, None], index
