"""`python -m experiments.loop_overhead`: the share of a step's time that the training loop adds to the step.

Takes the steps of the quickstart's stage twice: through the loop, with its data, metrics and checks (checkpoints and
evaluation are off the clock), and as bare calls of the jitted step on the same batches, which lie on the device.
Both alternate; printed are the medians of their times and of the shares, by the clock on the wall and by the processor
time of all threads of this process, which other programs on the machine disturb less.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clara_jax.config import parse_train_config
from clara_jax.sharding import place_batch
from clara_jax.training.checkpoint import Checkpoints
from clara_jax.training.loop import Loop, Profile
from clara_jax.training.metrics import MetricsLog
from clara_jax.training.setup import Run, prepare, use_compilation_cache
from clara_jax.training.state import TrainState
from clara_jax.training.stop import StopRequest

CONFIG = Path("configs/quickstart/compression_pretraining.yaml")


class Clock(StopRequest):
    """Notes when the loop asks whether to stop, which is after every step, and says so after the last."""

    def __init__(self, steps: int):
        super().__init__()
        self.steps, self.times = steps, [np.zeros(2)]

    def reached(self, step: int) -> bool:
        """Whether this is the last step."""
        self.times.append(now())
        return step == self.steps


def time_loop(run: Run, state: TrainState, steps: int, folder: Path) -> np.ndarray:
    """Seconds per step through the loop."""
    run = dataclasses.replace(run, state=state)
    checkpoints = Checkpoints(folder, keep=1)
    with MetricsLog(folder, 0, run.steps) as log, Clock(steps + 1) as clock:
        Loop(run, checkpoints, log).take_steps(clock, Profile(None, folder))
    checkpoints.close()
    # When it is asked after step n, step n - 1 is done and n under way: steps 2 to `steps` lie between these two.
    return (clock.times[-1] - clock.times[2]) / (steps - 1)


def time_steps(run: Run, state: TrainState, batches: list[Any]) -> np.ndarray:
    """Seconds per bare step, of the same steps: while one is under way the next is dispatched, as in the loop."""
    state, before = run.step(state, run.frozen, batches[0])
    state, metrics = run.step(state, run.frozen, batches[1])
    jax.block_until_ready(before)
    since = now()
    for batch in batches[2:]:
        before = metrics
        state, metrics = run.step(state, run.frozen, batch)
        jax.block_until_ready(before)
    return (now() - since) / len(batches[2:])


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    config = parse_train_config([f"--config={CONFIG}", "--checkpoint_every=1000000"])
    use_compilation_cache(config.compilation_cache)
    run = prepare(config, print)
    batches = list(_placed(run, options.steps + 1))
    state = run.state
    print(f"{options.steps} steps on {run.mesh.size} x {run.mesh.devices.flat[0].device_kind}", flush=True)
    time_steps(run, _copy(state), batches)  # compiles
    bare, loops = [], []
    for repeat in range(2 * options.repeats):
        if repeat % 4 in (0, 3):  # in turn first and second, so that a machine that slows down favours neither
            bare.append(time_steps(run, _copy(state), batches))
        else:
            with tempfile.TemporaryDirectory() as folder:
                loops.append(time_loop(run, _copy(state), options.steps, Path(folder)))
    shares = 1 - np.array(bare) / np.array(loops)
    for clock, name in enumerate(("wall", "processor")):
        step, loop = np.median(bare, 0)[clock], np.median(loops, 0)[clock]
        low, share, high = np.quantile(shares[:, clock], [0.25, 0.5, 0.75])
        print(
            f"{name}: step {step * 1e3:.1f} ms, with the loop {loop * 1e3:.1f} ms, "
            f"share of the loop {share:.1%} (quartiles {low:.1%} and {high:.1%})"
        )


def now() -> np.ndarray:
    """Seconds by the clock on the wall, and of processor time."""
    return np.array([time.perf_counter(), time.process_time()])


def _placed(run: Run, number: int) -> Iterator[Any]:
    for counted in islice(run.batches.iterate(0), number):
        yield place_batch(run.mesh, counted.batch, run.config.batch_size)


def _copy(state: TrainState) -> TrainState:
    """A state that a step may take over."""
    return jax.tree.map(lambda leaf: leaf.copy(), state)


if __name__ == "__main__":
    main()
