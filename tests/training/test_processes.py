"""Several processes as one run: they compute what one does, stop together, and none waits for a lost one."""

import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from clara_jax.config import parse_train_config
from clara_jax.training.loop import train
from tests.training.commands import Command, free_port, losses, saved_steps, write_data
from tests.training.test_train import arguments

LOST_AFTER = 10


def start(folder: Path, number: int, *overrides: str, last: tuple[str, ...] = ()) -> list[Command]:
    """The processes of a run in `folder/run`; the last has settings of its own."""
    port = free_port()
    return [
        Command(
            folder,
            "run",
            *overrides,
            f"--cluster.coordinator=localhost:{port}",
            f"--cluster.processes={number}",
            f"--cluster.process={process}",
            f"--cluster.lost_after={LOST_AFTER}",
            *(last if process == number - 1 else ()),
        )
        for process in range(number)
    ]


def assert_same_losses(folder: Path, *overrides: str) -> None:
    """The run has logged the losses of one process on one device."""
    whole = folder / "whole"
    train(parse_train_config(arguments(whole, write_data(folder), *overrides)))
    mine, expected = losses(folder / "run"), losses(whole)
    assert [entry[:2] for entry in mine] == [entry[:2] for entry in expected]
    np.testing.assert_allclose([e[2] for e in mine], [e[2] for e in expected], rtol=1e-5)


@pytest.mark.parametrize(
    ("number", "mesh"),
    [
        (2, ("--mesh.data=2",)),
        (2, ("--mesh.data=1", "--mesh.fsdp=2")),
        (4, ("--mesh.data=4",)),
        (4, ("--mesh.data=1", "--mesh.fsdp=2", "--mesh.tensor=2")),
    ],
)
def test_processes_compute_what_one_does(tmp_path: Path, number: int, mesh: tuple[str, ...]):
    """If this broke, a run on several hosts would train another model than one on a single host."""
    for command in start(tmp_path, number, "--steps=5", *mesh):
        assert command.status() == 0, command.output
    assert_same_losses(tmp_path, "--steps=5")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_others(tmp_path: Path, victim: int):
    """If this broke, one failed host would leave all others waiting, and paid for, until somebody looks."""
    commands = start(tmp_path, 2, "--steps=100000", "--mesh.data=2")
    commands[0].until_said("\nstep 5/")
    commands[victim].send(signal.SIGKILL)
    since, other = time.monotonic(), commands[1 - victim]
    status = other.status()
    assert time.monotonic() - since < 2 * LOST_AFTER
    assert status == 2 or status == -signal.SIGABRT, other.output
    if status == 2:
        said = f"error in process {1 - victim} of 2: another process was lost, or a device failed"
        assert said in other.output and "go on from the last checkpoint" in other.output
    else:
        assert "another task died" in other.output
    assert commands[victim].status() == -signal.SIGKILL


def test_a_process_that_never_starts_is_missed(tmp_path: Path):
    """If this broke, a job with a host too few would hang, or end in a stack trace of C++."""
    alone = Command(
        tmp_path,
        "run",
        f"--cluster.coordinator=localhost:{free_port()}",
        "--cluster.processes=2",
        "--cluster.process=0",
        "--cluster.meet_within=3",
    )
    assert alone.status(60) == 2
    assert re.fullmatch(
        r"error: cluster: the processes have not all met at localhost:\d+ within 3 s\. See that each .*\n", alone.output
    )


def test_wrong_input_of_one_process_ends_all(tmp_path: Path):
    """If this broke, a file that is missing on one host would leave the others waiting for it."""
    well, wrong = start(tmp_path, 2, "--steps=5", "--mesh.data=2", last=("--data.path=[/nowhere.jsonl]",))
    assert wrong.status() == 2
    assert "error in process 1 of 2: " in wrong.output and "/nowhere.jsonl" in wrong.output
    assert "Traceback" not in wrong.output
    since = time.monotonic()
    assert well.status() in (2, -signal.SIGABRT), well.output
    assert time.monotonic() - since < 2 * LOST_AFTER


@pytest.mark.parametrize(("number", "told"), [(signal.SIGTERM, (1,)), (signal.SIGINT, (0, 1))])
def test_told_to_stop_all_save_the_same_step_and_go_on(tmp_path: Path, number: signal.Signals, told: tuple[int, ...]):
    """If this broke, a host that is preempted, or Ctrl-C, would cost the steps since the last save, or hang."""
    overrides = ("--steps=30", "--checkpoint_every=1000")
    commands = start(tmp_path, 2, *overrides, "--mesh.data=2")
    commands[0].until_said("\nstep 2/")
    for process in told:
        commands[process].send(number)
    assert [command.status() for command in commands] == [128 + signal.SIGTERM] * 2, commands[0].output
    said = re.search(r"Stopped after step (\d+) of 30, loss \S+, and saved", commands[0].output)
    assert said and saved_steps(tmp_path / "run") == [int(said[1])]
    for command in commands:
        assert "Traceback" not in command.output
    train(parse_train_config(arguments(tmp_path / "run", write_data(tmp_path), *overrides)))
    assert_same_losses(tmp_path, *overrides)
