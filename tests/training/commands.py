"""Training as a user starts it: in processes of its own, which tests can kill."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests.conftest import FIXTURES, ROOT

RECORDS = [
    {"question": [f"Who built mill {i}?"], "answers": [f"Dronor {i}"], "docs": [f"Mill {i} was built by Dronor {i}."]}
    for i in range(12)
]


class Command:
    """`python -m clara_jax.train` on one device, its output in a file of its own."""

    started: ClassVar[list["Command"]] = []

    def __init__(self, folder: Path, run: str, *overrides: str):
        """Start it for the run directory `folder/run`; data and caches are shared by all commands in `folder`."""
        self.run_dir = folder / run
        settings = {
            "run_dir": self.run_dir,
            "stage": "compression_pretraining",
            "model.base": FIXTURES / "mistral_window" / "base",
            "model.doc_max_length": 32,
            "model.compression_rate": 8,
            "data.path": f"[{write_data(folder)}]",
            "data.cache_dir": folder / "tokens",
            "lora.rank": 2,
            "mesh.data": 1,
            "batch_size": 4,
            "log_every": 1,
            "checkpoint_every": 3,
            "optimizer.learning_rate": 0.01,
        }
        environment = os.environ | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_cpu_parallel_codegen_split_count=1 "
            "--xla_backend_optimization_level=0",
            "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),  # of all tests of this worker
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        arguments = [*(f"--{key}={value}" for key, value in settings.items()), *overrides]
        number = len(list(folder.glob("*.log")))
        self.log = folder / f"{number:03}.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "clara_jax.train", *arguments],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.started.append(self)

    @classmethod
    def end_all(cls) -> None:
        """Kill what a failed test has left running."""
        while cls.started:
            process = cls.started.pop()._process
            process.kill()
            process.wait()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def output(self) -> str:
        """All that it has said so far."""
        return self.log.read_text(encoding="utf-8")

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    def until(self, reached: Callable[[], Any], seconds: float = 120) -> bool:
        """Wait until something is so; False if the command has ended before."""
        end = time.monotonic() + seconds
        while not reached():
            if not self.running:
                return False
            assert time.monotonic() < end, self.output
            time.sleep(0.001)
        return True

    def until_said(self, text: str) -> None:
        """Wait until it says `text`."""
        assert self.until(lambda: text in self.output), self.output

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def status(self, seconds: float = 300) -> int:
        """Its exit status, as Popen gives it, when it has ended; it is killed after so many seconds."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.output}") from None


def write_data(folder: Path) -> Path:
    """A file of records in `folder`, the same for all."""
    path = folder / "data.jsonl"
    if not path.exists():
        path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    return path


def finished(folder: Path, run: str, *overrides: str) -> Path:
    """The run directory of a command that has run to its end."""
    command = Command(folder, run, *overrides)
    assert command.status() == 0, command.output
    return command.run_dir


def free_port() -> int:
    """A port at which nobody listens."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def losses(run_dir: Path) -> list[tuple[int, str, float]]:
    """(step, name, value) of every logged loss in the order of the file."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    names = ("loss", "evaluation/loss")
    return [(line["step"], name, line[name]) for line in lines for name in names if name in line]


def saved_steps(run_dir: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    return sorted(int(path.name) for path in (run_dir / "checkpoints").glob("*") if path.name.isdigit())


def saved_state(run_dir: Path) -> dict[str, np.ndarray]:
    """Every array of the latest checkpoint's training state by its path."""
    folder = run_dir / "checkpoints" / str(saved_steps(run_dir)[-1]) / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        found = checkpointer.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), found)
        state = checkpointer.restore(folder, restore_args=as_numpy)
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def assert_same_run(run_dir: Path, expected: Path) -> None:
    """Both runs have logged the same losses and ended in the same state, bit for bit."""
    assert losses(run_dir) == losses(expected)
    assert saved_steps(run_dir)[-1] == saved_steps(expected)[-1]
    mine, theirs = saved_state(run_dir), saved_state(expected)
    assert mine.keys() == theirs.keys() and {"['rng']", "['step']"} < mine.keys()
    for path, leaf in theirs.items():
        assert leaf.dtype == mine[path].dtype and leaf.tobytes() == mine[path].tobytes(), path
