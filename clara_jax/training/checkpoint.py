"""Checkpoints of a run, by Orbax: `checkpoints/<step>/` with the training state, all adapters and the data's place.

A checkpoint becomes visible under its step only when it is complete. The base model is not in it; the
run's `config.yaml` names it and `base.json` holds its fingerprint.
"""

import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    LatestN,
    PreservationPolicy,
)

from clara_jax.cluster import is_loss
from clara_jax.errors import UserError, fail
from clara_jax.files import replace_text
from clara_jax.interop.base import base_fingerprint
from clara_jax.models.roles import Params
from clara_jax.training.state import TrainState

CHECKPOINTS, BASE = "checkpoints", "base.json"


@dataclasses.dataclass(frozen=True)
class DataPlace:
    """Where a run stands in its data: batch `next_batch` of the order that belongs to `fingerprint`."""

    next_batch: int
    fingerprint: str


class Checkpoints:
    """The checkpoints of one run directory, written in the background."""

    def __init__(self, run_dir: Path, keep: int, keep_best: str | None = None):
        """Open (or make) the run's checkpoint folder.

        The latest `keep` are kept, and the one with the best `keep_best`, an evaluation metric's name.
        """
        _say_errors_once()
        self._run_dir = run_dir
        self._folder = (run_dir / CHECKPOINTS).absolute()
        self._evaluations = {step: _read_evaluation(self._folder / str(step)) for step in complete_steps(run_dir)}
        policies: list[PreservationPolicy] = [LatestN(keep)]
        if keep_best is not None:
            policies.append(_Only(lambda: self.best(keep_best)))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies), cleanup_tmp_directories=True
        )
        with self._reported():
            self._manager = ocp.CheckpointManager(self._folder, options=options)

    @property
    def latest(self) -> int | None:
        """Step of the latest complete checkpoint."""
        return self._manager.latest_step()

    def best(self, name: str) -> int | None:
        """Step of the checkpoint with the best evaluation metric `name`: the lowest loss, the highest share."""
        values = {step: metrics[name] for step, metrics in self._evaluations.items() if name in metrics}
        best = min if name.endswith(("loss", "cross_entropy", "mse")) else max
        return best(values, key=values.__getitem__, default=None)

    def save(
        self, step: int, state: TrainState, others: Params, place: DataPlace, evaluation: Mapping[str, float]
    ) -> None:
        """Save in the background: the state, what else a model needs beside its base, and how it was evaluated.

        Raises `UserError` if this save, or an earlier one that ran on, cannot be written.
        """
        self._evaluations[step] = dict(evaluation)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(_plain(state)),
            others=ocp.args.StandardSave(others),
            data=ocp.args.JsonSave(dataclasses.asdict(place)),
            evaluation=ocp.args.JsonSave(dict(evaluation)),
        )
        with self._reported():
            self._manager.save(step, args=items, force=True)

    def restore(self, like: TrainState) -> tuple[TrainState, DataPlace]:
        """The latest state, on the devices that hold `like`, and where the data stood."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain(like))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        try:
            items = self._manager.restore(self.latest, args=args)
            fields, place = items["state"], DataPlace(**items["data"])
        except (OSError, ValueError, KeyError, TypeError) as error:  # for a file that is missing, cut or garbled
            earlier = [step for step in complete_steps(self._run_dir) if step != self.latest]
            rest = f"from step {earlier[-1]}" if earlier else "from the start"
            fail(
                f"{self._folder / str(self.latest)} cannot be read ({_reason(error)})",
                f"If its files are damaged remove that folder, and the same command goes on {rest}",
            )
        state = TrainState(**{**fields, "rng": jax.random.wrap_key_data(fields["rng"])})
        return state, place

    def finish(self) -> None:
        """Wait for saves under way. Raises `UserError` if one cannot be written."""
        with self._reported():
            self._manager.wait_until_finished()

    def check(self) -> None:
        """Raise `UserError` if the latest save has failed since; takes no time, to be asked after every step."""
        if not self._manager.is_saving_in_progress():
            self.finish()

    def close(self, error: BaseException | None = None) -> None:
        """Let go of the folder after the saves under way; `error` is what ended the run, if anything did."""
        if is_loss(error):
            return  # a save would wait until every process has written its part
        with self._reported() if error is None else suppress(OSError, ValueError, RuntimeError):
            self._manager.close()

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:  # what Orbax and TensorStore raise for a failed write
            if is_loss(error):
                raise
            complete = complete_steps(self._run_dir)
            kept = f"that of step {complete[-1]} is intact" if complete else "there is no earlier one"
            raise UserError(
                f"{self._folder}: a checkpoint could not be written ({_reason(error)}); {kept}. "
                "Make room or correct the folder's permissions, then give the same command to go on."
            ) from error


def complete_steps(run_dir: Path) -> list[int]:
    """The steps of a run's complete checkpoints, in order."""
    return sorted(int(path.name) for path in (run_dir / CHECKPOINTS).glob("*") if path.name.isdigit())


def restore_adapters(run_dir: Path, step: int | None = None) -> Params:
    """All adapters, the memory tokens and the special rows of a run's checkpoint (by default its latest)."""
    folder = run_dir / CHECKPOINTS
    if not folder.is_dir():
        fail(f"{run_dir} holds no checkpoints", "Name a run directory, or train it first")
    # Opened as a writer opens it, and nothing is written: Orbax warns three times about a read-only manager.
    options, items = ocp.CheckpointManagerOptions(create=False), ("state", "others")
    others = {name: ocp.JsonCheckpointHandler() for name in ("data", "evaluation")}
    handlers = {name: ocp.PyTreeCheckpointHandler() for name in items} | others
    with ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handlers) as manager:
        step = manager.latest_step() if step is None else step
        if step is None:
            fail(f"{folder} holds no complete checkpoint", "Let the run reach its first checkpoint")
        found = manager.item_metadata(step)
        args = {name: ocp.args.PyTreeRestore(restore_args=_as_numpy(found[name])) for name in items}
        restored = manager.restore(step, args=ocp.args.Composite(**args))
    return {**restored["others"], **restored["state"]["trainable"]}


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
    replace_text(path, json.dumps({"folder": str(base_folder.absolute()), "fingerprint": found}))


@dataclasses.dataclass(frozen=True)
class _Only(PreservationPolicy):
    """Preserves the checkpoint of one step, if there is one. (Orbax's own best-of forgets its metrics on resuming.)"""

    step: Callable[[], int | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Which of `checkpoints` (Orbax's PolicyCheckpointInfo, a protocol that cannot be checked) to keep."""
        return [checkpoint.step == self.step() for checkpoint in checkpoints]


def _read_evaluation(checkpoint: Path) -> dict[str, float]:
    path = checkpoint / "evaluation" / "metadata"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}  # not evaluated, or damaged: such a checkpoint is not the best one


def _reason(error: Exception) -> str:
    """What is said of an error, without TensorStore's places in its own source; both ends of a long text."""
    text = str(error).strip().split("\n")[0].split(" [source locations=")[0]
    return text if len(text) <= 300 else f"{text[:100]} ... {text[-200:]}"


def _say_errors_once() -> None:
    """Orbax raises the errors of its background threads, which then are said in a line; here it is told not to log
    their tracebacks too, nor those of the requests under way that find its event loop closed after one has failed.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_has_no_traceback)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _unraisable


def _has_no_traceback(record: logging.LogRecord) -> bool:
    return record.exc_info is None


def _unraisable(found: "sys.UnraisableHookArgs") -> None:
    if str(found.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(found)


def _as_numpy(metadata: Any) -> Any:
    """Arrays of the host, so that a checkpoint can be read on any number of devices."""
    return jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree)


def _plain(state: TrainState) -> dict[str, Any]:
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {**fields, "rng": jax.random.key_data(state.rng)}
