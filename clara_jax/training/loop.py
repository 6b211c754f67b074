"""The training loop: dispatch a step, then log the one before, so that logging never makes the device wait."""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from clara_jax.cluster import is_main, main_first
from clara_jax.config import TrainConfig, config_text, save_config
from clara_jax.data.pipeline import Counted
from clara_jax.errors import UserError, fail
from clara_jax.scoring.retrieval_sums import retrieval_means
from clara_jax.sharding import place_batch
from clara_jax.training.checkpoint import Checkpoints, DataPlace, write_base_fingerprint
from clara_jax.training.evaluation import describe
from clara_jax.training.event_file import code_block
from clara_jax.training.flops import batch_lengths, peak_flops, step_flops
from clara_jax.training.metrics import MetricsLog
from clara_jax.training.objectives import Metrics
from clara_jax.training.runs import CONFIG
from clara_jax.training.setup import Run, prepare, use_compilation_cache
from clara_jax.training.state import TrainState
from clara_jax.training.stop import StopRequest


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: after `step` of `steps`.

    `loss` is its last one, None if it took no step; `best` the step of the checkpoint with the best `keep_best`.
    """

    step: int
    steps: int
    loss: float | None
    best: int | None = None

    @property
    def finished(self) -> bool:
        """Whether all steps are taken; else the run was told to stop, and has saved."""
        return self.step >= self.steps


def train(config: TrainConfig) -> Outcome:
    """Run (or go on with) a training run. A finished one is left as it is.

    Everything that can be wrong with the input is found before the run directory is made.
    """
    use_compilation_cache(config.compilation_cache)
    run = prepare(config, print)
    run_dir = Path(config.run_dir)
    _make_run_dir(run_dir, run)
    checkpoints = Checkpoints(run_dir, config.keep_checkpoints, config.keep_best)
    try:
        if checkpoints.latest is not None:
            run = _resumed(run, checkpoints)
        first = int(run.state.step)
        if first >= run.steps:
            return Outcome(first, run.steps, None)
        if is_main():
            with _writing(run_dir):
                save_config(config, run_dir / CONFIG)
            print(_headline(run, first), flush=True)
        with (
            MetricsLog(run_dir, first, run.steps, enabled=is_main()) as log,
            StopRequest() as stop,
            Profile(config.profile, run_dir / "profile") as profile,
        ):
            if first == 0:
                log.write_text(0, "config", code_block(config_text(config), "yaml"))
            outcome = Loop(run, checkpoints, log).take_steps(stop, profile)
            checkpoints.finish()
        best = None if config.keep_best is None else checkpoints.best(config.keep_best)
        return dataclasses.replace(outcome, best=best)
    finally:
        checkpoints.close(sys.exception())


class Loop:
    """The steps of a run. `pending` is the step whose metrics the device may still be computing."""

    def __init__(self, run: Run, checkpoints: Checkpoints, log: MetricsLog):
        self.run, self.checkpoints, self.log = run, checkpoints, log
        # All at once: asked for one by one they would wait for the step that the device is at.
        self.rates = np.broadcast_to(np.asarray(run.schedule(np.arange(run.steps))), run.steps)
        self.pending: tuple[int, Metrics, Counted] | None = None
        self.since = time.perf_counter()
        self.loss = math.nan

    def take_steps(self, stop: StopRequest, profile: "Profile") -> Outcome:
        """Take the steps that are left, or those up to a request to stop."""
        run, config, state = self.run, self.run.config, self.run.state
        number = int(state.step)
        batches = run.batches.iterate(number)
        while number < run.steps:
            number += 1
            profile.before(number)
            counted = next(batches)
            batch = place_batch(run.mesh, counted.batch, config.batch_size)
            state, metrics = run.step(state, run.frozen, batch)
            self.report()
            self.checkpoints.check()
            self.pending = (number, metrics, counted)
            profile.after(number, metrics)
            last, stopped = number == run.steps, stop.reached(number)
            evaluates = run.evaluation is not None and (last or (number % config.evaluation.every == 0 and not stopped))
            if last or stopped or evaluates or number % config.checkpoint_every == 0:
                self.report()  # a checkpoint must not be of a step whose loss is not a number
                found = self.evaluate(number, state) if evaluates else {}
                place = DataPlace(number, run.batches.data.fingerprint)
                self.checkpoints.save(number, state, run.others, place, found)
                self.since = time.perf_counter()
            if stopped:
                break
        return Outcome(number, run.steps, self.loss)

    def report(self) -> None:
        """Wait for the pending step, and log it."""
        if self.pending is None:
            return
        number, metrics, counted = self.pending
        self.pending = None
        found = jax.device_get(metrics)
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        self.loss = float(found["loss"])
        if not math.isfinite(self.loss):
            fail(
                f"the loss of step {number} is {self.loss}",
                "Lower optimizer.learning_rate or look at the data of that step; the last checkpoint is from before it",
            )
        self.log.advance()
        if number % self.run.config.log_every == 0 or number == self.run.steps:
            self.log.write(number, self.values(number, found, counted, seconds))

    def values(self, number: int, found: Metrics, counted: Counted, seconds: float) -> dict[str, float]:
        """What is logged of a step."""
        retrieval = found.pop("retrieval", None)
        return {
            **{name: float(value) for name, value in found.items()},
            **({} if retrieval is None else retrieval_means(retrieval)),
            "learning_rate": float(self.rates[number - 1]),
            "step_seconds": seconds,
            "target_tokens_per_second": counted.target_tokens / seconds,
            "document_tokens_per_second": counted.document_tokens / seconds,
            "padding_share": counted.padding,
            "texts_cut": counted.cut,
            **self.speed(counted, seconds),
        }

    def speed(self, counted: Counted, seconds: float) -> dict[str, float]:
        """Model FLOPs of real tokens per device, and their share of its peak where that is known."""
        run, config = self.run, self.run.config
        decoder = run.model.model.decoder.config
        mine = step_flops(decoder, config.lora.rank, config.stage, config.trains, batch_lengths(counted.batch))
        whole = mine * config.batch_size / len(run.batches.rows)
        device = run.mesh.devices.flat[0]
        per_second = whole / seconds / run.mesh.size
        peak = peak_flops(device.device_kind)
        return {"tflops_per_device": per_second / 1e12} | ({} if peak is None else {"mfu": per_second / peak})

    def evaluate(self, number: int, state: TrainState) -> Mapping[str, float]:
        """Evaluate, and log what comes out."""
        assert self.run.evaluation is not None
        since = time.perf_counter()
        values, answered = self.run.evaluation(state.trainable, self.run.frozen)
        values["evaluation/seconds"] = time.perf_counter() - since
        self.log.write(number, values)
        shown = answered[: self.run.config.evaluation.show]
        if shown:
            self.log.write_text(number, "evaluation/answers", describe(shown))
        wanted = self.run.config.keep_best
        if wanted is not None and wanted not in values:
            fail(f"keep_best is {wanted}, which this evaluation does not give", f"Choose from {', '.join(values)}")
        return values


class Profile:
    """A profiler trace of the steps from the first to the last of `steps`, written to `folder`."""

    def __init__(self, steps: list[int] | None, folder: Path):
        self._steps, self._folder, self._running = steps, folder, False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *error: object) -> None:
        if self._running:
            jax.profiler.stop_trace()

    def before(self, step: int) -> None:
        """Start with the first step."""
        if self._steps is not None and step == self._steps[0]:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, metrics: Metrics) -> None:
        """Stop after the last, when the device is done with it."""
        if self._running and self._steps is not None and step == self._steps[1]:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            self._running = False


def _resumed(run: Run, checkpoints: Checkpoints) -> Run:
    config = run.config
    if config.resume == "never":
        fail(f"{config.run_dir} holds a checkpoint of step {checkpoints.latest}", "Set resume to auto, or name another")
    state, place = checkpoints.restore(run.state)
    if place.fingerprint != run.batches.data.fingerprint:
        fail(
            f"data: its content is not what {config.run_dir} was trained on up to step {checkpoints.latest}",
            "Restore the files or settings of data, or name another run_dir",
        )
    return dataclasses.replace(run, state=state)


def _headline(run: Run, first: int) -> str:
    axes = " x ".join(f"{name} {size}" for name, size in run.mesh.shape.items() if size > 1) or "1"
    device = run.mesh.devices.flat[0].device_kind
    return (
        f"{run.config.stage} on {run.mesh.size} x {device} ({axes}) in {jax.process_count()} process(es), "
        f"attention {run.config.model.attention}: "
        f"steps {first + 1} to {run.steps} of {run.config.batch_size} records"
    )


def _make_run_dir(run_dir: Path, run: Run) -> None:
    with _writing(run_dir), main_first("run directory"):
        if is_main():
            run_dir.mkdir(parents=True, exist_ok=True)
            write_base_fingerprint(run_dir, run.model.base_folder)


@contextlib.contextmanager
def _writing(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"run_dir {run_dir} cannot be written ({error.strerror}). Name another run_dir.") from None
