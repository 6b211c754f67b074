"""The four stages of the paper: what each trains, on what, and by which loss (paper, Table 10)."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

from clara_jax.data.samples import SampleKind
from clara_jax.errors import fail
from clara_jax.models.roles import ROLES, Params, RoleModel
from clara_jax.training.objectives import (
    Objective,
    ObjectiveConfig,
    compression_objective,
    end_to_end_objective,
    retrieval_objective,
)

StageName = Literal["compression_pretraining", "instruction_tuning", "end_to_end", "retrieval_pretraining"]
TRAINABLE = (*ROLES, "memory_tokens")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage: the subtrees it trains by default, its loss, and how a record becomes a sample."""

    trains: tuple[str, ...]
    objective: Callable[[RoleModel, ObjectiveConfig], Objective]
    samples: SampleKind


STAGES: dict[StageName, Stage] = {
    "compression_pretraining": Stage(
        ("compressor", "generator", "memory_tokens"), compression_objective, "compression"
    ),
    "instruction_tuning": Stage(("compressor", "generator", "memory_tokens"), compression_objective, "instruction"),
    "end_to_end": Stage(("query_reasoner", "generator"), end_to_end_objective, "retrieval"),
    "retrieval_pretraining": Stage(("query_reasoner",), retrieval_objective, "retrieval"),
}


def split_trainable(params: Params, names: tuple[str, ...]) -> tuple[Params, Params]:
    """(trainable, frozen): `params` split by subtree name. Raises `UserError` for an unknown name."""
    check_trainable("trainable", names)
    if not names:
        fail("trainable: nothing is to be trained", f"Choose from {', '.join(TRAINABLE)}")
    missing = [name for name in names if name not in params]
    if missing:
        fail(f"trainable: this stage has no {missing[0]}", f"Choose from {', '.join(set(params) - {'base'})}")
    trainable = {name: params[name] for name in names}
    return trainable, {name: tree for name, tree in params.items() if name not in names}


def check_trainable(key: str, names: Sequence[str]) -> None:
    """Refuse names that are not subtrees which can be trained; `key` is where they were given."""
    for name in names:
        if name not in TRAINABLE:
            fail(f"{key}: '{name}' cannot be trained", f"Choose from {', '.join(TRAINABLE)}")
