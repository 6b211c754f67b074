"""What a run survives: being killed or told to stop, a full disk, another mesh, damaged files, changed input."""

import random
import re
import resource
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from clara_jax.config import parse_train_config
from clara_jax.errors import UserError
from clara_jax.training.loop import train
from tests.training.commands import Command, assert_same_run, finished, losses, saved_state, saved_steps, write_data
from tests.training.test_train import arguments

KILLS = 20
PARTIAL = "*.orbax-checkpoint-tmp"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path)


def test_a_run_survives_being_killed_at_any_moment(tmp_path: Path):
    """If this broke, a machine that fails would cost more than the steps since the last save, or change the result."""
    overrides = (
        "--steps=120",
        f"--evaluation.path=[{tmp_path / 'data.jsonl'}]",
        "--evaluation.every=10",
        "--evaluation.records=4",
        "--evaluation.generate=0",
        "--keep_best=evaluation/loss",
    )
    command = Command(tmp_path, "whole", *overrides)
    command.until_said("\nstep ")
    since = time.monotonic()
    assert command.status() == 0, command.output
    whole, a_step = command.run_dir, (time.monotonic() - since) / 120
    chance, landed, saved = random.Random(0), Counter(), 0
    for kill in range(KILLS):
        command = Command(tmp_path, "killed", *overrides)
        checkpoints = command.run_dir / "checkpoints"
        aim = "start-up" if kill % 5 == 0 else "save" if kill % 5 == 1 else "step"
        if aim == "start-up":
            time.sleep(chance.uniform(0.0, 8.0))
        else:
            command.until_said("\nstep ")
            if aim == "save":
                command.until(lambda: any(checkpoints.glob(PARTIAL)))
            time.sleep(chance.uniform(0.0, a_step / 4 if aim == "save" else 8 * a_step))
            if aim == "step":  # where steps are much faster than the disk, most of a run is one save or another
                command.until(lambda: not any(checkpoints.glob(PARTIAL)))
        command.send(signal.SIGKILL)
        assert command.status() == -signal.SIGKILL, command.output
        first = re.search(r"steps (\d+) to", command.output)
        assert first is None or int(first[1]) == saved + 1, "goes on after the last complete checkpoint"
        started, saving = "\nstep " in command.output, any(checkpoints.glob(PARTIAL))
        landed["start-up" if not started else "save" if saving else "step"] += 1
        saved = max(saved_steps(command.run_dir), default=0)
    print(f"kills landed in {dict(landed)}; checkpoint {saved} is the last")
    assert landed["start-up"] and landed["save"] and landed["step"]
    assert_same_run(finished(tmp_path, "killed", *overrides), whole)


def test_a_run_that_is_told_to_stop_saves_and_goes_on(tmp_path: Path):
    """If this broke, a preempted job would lose its steps since the last save, or its scheduler take it for done."""
    overrides = ("--steps=60", "--checkpoint_every=1000")
    whole = finished(tmp_path, "whole", *overrides)
    stopped = tmp_path / "stopped"
    for number in (signal.SIGTERM, signal.SIGINT):
        command = Command(tmp_path, stopped.name, *overrides)
        command.until_said("\nstep ")
        command.send(number)
        assert command.status() == 128 + signal.SIGTERM, command.output
        said = re.search(r"Stopped after step (\d+) of 60, loss \S+, and saved. Give the same command", command.output)
        assert said and saved_steps(stopped)[-1] == int(said[1]) < 60
        assert "Traceback" not in command.output
    early = Command(tmp_path, stopped.name, *overrides)
    time.sleep(1.0)  # it is still importing
    early.send(signal.SIGTERM)
    assert early.status() == -signal.SIGTERM and early.output == ""
    assert_same_run(finished(tmp_path, stopped.name, *overrides), whole)


def test_a_full_disk_ends_a_run_in_one_line_and_it_goes_on(tmp_path: Path):
    """If this broke, a run would go on for days without saving, or lose its good checkpoint to a bad one."""
    overrides = ("--steps=60",)
    whole = finished(tmp_path, "whole", *overrides)
    command = Command(tmp_path, "full", *overrides)
    command.until(lambda: saved_steps(command.run_dir))
    limit = max(path.stat().st_size for path in (command.run_dir / "checkpoints").rglob("*") if path.is_file()) // 2
    resource.prlimit(command.pid, resource.RLIMIT_FSIZE, (limit, limit))
    assert command.status() == 2, command.output
    kept = saved_steps(command.run_dir)[-1]
    last = losses(command.run_dir)[-1][0]
    error = command.output.splitlines()[-1]
    assert error.startswith(f"error: {command.run_dir}/checkpoints: a checkpoint could not be written (")
    assert "File too large" in error and f"that of step {kept} is intact. Make room" in error
    assert "Traceback" not in command.output
    assert last <= kept + 3 + 3, "said at the next save at the latest"
    assert_same_run(finished(tmp_path, "full", *overrides), whole)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path: Path):
    """If this broke, a bad disk would end a run for good, or give it wrong numbers."""
    overrides = ("--steps=6",)
    whole = finished(tmp_path, "whole", *overrides)
    damaged = tmp_path / "damaged"
    shutil.copytree(whole, damaged)
    latest = damaged / "checkpoints" / "6"
    for path in (latest / "state" / "d").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    command = Command(tmp_path, damaged.name, *overrides)
    assert command.status() == 2
    error = command.output.splitlines()[-1]
    assert error.startswith(f"error: {latest} cannot be read (") and error.endswith(
        "If its files are damaged remove that folder, and the same command goes on from step 3."
    )
    assert "Traceback" not in command.output
    shutil.rmtree(latest)
    assert_same_run(finished(tmp_path, damaged.name, *overrides), whole)


def test_a_run_goes_on_on_another_number_of_devices(tmp_path: Path, data: Path):
    """If this broke, a run could not move to the machines that are free, or would end elsewhere than it should."""
    overrides = ("--batch_size=8", "--steps=6", "--checkpoint_every=3")
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    train(parse_train_config(arguments(whole, data, *overrides)))
    train(parse_train_config(arguments(moved, data, *overrides, "--mesh.data=4", "--mesh.fsdp=2")))
    shutil.rmtree(moved / "checkpoints" / "6")
    train(parse_train_config(arguments(moved, data, *overrides)))
    assert [entry[:2] for entry in losses(moved)] == [(step, "loss") for step in range(1, 7)]
    np.testing.assert_allclose([e[2] for e in losses(moved)], [e[2] for e in losses(whole)], rtol=1e-5)
    expected = saved_state(whole)
    for path, leaf in saved_state(moved).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-3, atol=1e-5, err_msg=path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--resume=never", "run holds a checkpoint of step 1. Set resume to auto"),
        ("--batch_size=8", "batch_size is 8, and .*run was trained with 4. Give the same value"),
        ("--optimizer.learning_rate=0.5", "optimizer.learning_rate is 0.5, and .*run was trained with 0.01"),
        ("data", "data: its content is not what .*run was trained on up to step 1. Restore the files"),
        ("damage", "checkpoints/1 cannot be read .*, and the same command goes on from the start"),
    ],
)
def test_what_would_be_another_run_is_refused(tmp_path: Path, data: Path, override: str, message: str):
    """If this broke, half of a run would be trained on other data or settings than its config.yaml says."""
    run_dir = tmp_path / "run"
    train(parse_train_config(arguments(run_dir, data, "--steps=1")))
    before = (run_dir / "config.yaml").read_bytes()
    more = []
    if override == "data":
        data.write_text(data.read_text().replace("mill 3", "mill 33"), encoding="utf-8")
    elif override == "damage":
        (run_dir / "checkpoints" / "1" / "data" / "metadata").unlink()
    else:
        more = [override]
    with pytest.raises(UserError, match=message):
        train(parse_train_config(arguments(run_dir, data, "--steps=2", *more)))
    if override.startswith("--"):
        assert (run_dir / "config.yaml").read_bytes() == before
