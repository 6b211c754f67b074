"""AdamW with gradient clipping and the reference's learning-rate schedules (paper, Table 10)."""

import dataclasses
import math
from typing import Literal

import optax

from clara_jax.errors import fail


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters are updated.

    Args:
        learning_rate: Peak learning rate.
        schedule: `cosine` falls to a tenth of the peak after a linear warm-up; `constant` does neither.
        warmup_ratio: Share of all steps spent warming up (cosine).
        final_ratio: The cosine's last learning rate, as a share of the peak.
        beta1: Decay of the gradient's running mean.
        beta2: Decay of the squared gradient's running mean.
        eps: Added to the root of the squared gradient's mean.
        weight_decay: Decoupled weight decay.
        clip_norm: Gradients are scaled down to this global norm.

    """

    learning_rate: float = 1e-4
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_ratio: float = 0.03
    final_ratio: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            fail(f"optimizer.learning_rate is {self.learning_rate}", "Give a positive one")
        for key in ("warmup_ratio", "beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                fail(f"optimizer.{key} is {getattr(self, key)}", "Give a share in [0, 1)")
        if not 0 <= self.final_ratio <= 1:
            fail(f"optimizer.final_ratio is {self.final_ratio}", "Give a share in [0, 1]")
        for key in ("eps", "clip_norm"):
            if not getattr(self, key) > 0:
                fail(f"optimizer.{key} is {getattr(self, key)}", "Give a positive number")
        if self.weight_decay < 0:
            fail(f"optimizer.weight_decay is {self.weight_decay}", "Give 0 or a positive number")


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of each of `steps` optimizer steps; the warm-up lasts ceil(warmup_ratio x steps)."""
    if config.schedule == "constant":
        return optax.constant_schedule(config.learning_rate)
    warmup = math.ceil(config.warmup_ratio * steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=config.learning_rate * config.final_ratio,
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clip to the global norm, then AdamW."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
        ),
    )
