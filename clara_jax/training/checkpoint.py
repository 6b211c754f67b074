"""Checkpoints of a run, by Orbax: `checkpoints/<step>/` with the training state and all adapters.

A checkpoint becomes visible under its step only when it is complete. The base model is not in it; the
run's `config.yaml` names it and `base.json` holds its fingerprint.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from clara_jax.errors import fail
from clara_jax.interop.base import base_fingerprint
from clara_jax.models.roles import Params
from clara_jax.training.state import TrainState

CHECKPOINTS, BASE = "checkpoints", "base.json"


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, run_dir: Path, keep: int):
        """Open (or make) the run's checkpoint folder; the latest `keep` are kept."""
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._manager = ocp.CheckpointManager((run_dir / CHECKPOINTS).absolute(), options=options)

    @property
    def latest(self) -> int | None:
        """Step of the latest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, others: Params) -> None:
        """Save in the background: the state, and what else a model needs beside its base."""
        items = {"state": _plain(state), "others": others}
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(**{name: ocp.args.StandardSave(item) for name, item in items.items()}),
        )

    def restore(self, like: TrainState) -> TrainState:
        """The latest state, shaped like `like`."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain(like))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        fields = self._manager.restore(self.latest, args=args)["state"]
        return TrainState(**{**fields, "rng": jax.random.wrap_key_data(fields["rng"])})

    def close(self) -> None:
        """Wait for saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()


def restore_adapters(run_dir: Path) -> Params:
    """All adapters, the memory tokens and the special rows of a run's latest checkpoint."""
    folder = run_dir / CHECKPOINTS
    if not folder.is_dir():
        fail(f"{run_dir} holds no checkpoints", "Name a run directory, or train it first")
    # Opened as a writer opens it, and nothing is written: Orbax warns three times about a read-only manager.
    with ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(create=False)) as manager:
        step = manager.latest_step()
        if step is None:
            fail(f"{folder} holds no complete checkpoint", "Let the run reach its first checkpoint")
        args = ocp.args.Composite(state=ocp.args.StandardRestore(), others=ocp.args.StandardRestore())
        items = manager.restore(step, args=args)
    return {**items["others"], **items["state"]["trainable"]}


def write_base_fingerprint(run_dir: Path, base_folder: Path) -> None:
    """Remember which base model the run is trained on; refuse to go on with another one."""
    path, found = run_dir / BASE, base_fingerprint(base_folder)
    if path.exists():
        expected = json.loads(path.read_text(encoding="utf-8"))["fingerprint"]
        if expected != found:
            fail(
                f"{run_dir} was trained on a base model with fingerprint {expected}, {base_folder} has {found}",
                "Point model.base at the run's own base model, or start a new run_dir",
            )
    path.write_text(json.dumps({"folder": str(base_folder.absolute()), "fingerprint": found}), encoding="utf-8")


def _plain(state: TrainState) -> dict[str, Any]:
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {**fields, "rng": jax.random.key_data(state.rng)}
