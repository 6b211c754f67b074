"""The files and the terminal output of a run."""

import errno
import io
import json
import math
import os
import sys
from pathlib import Path

import pandas
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as ServedEvents,  # what the TensorBoard server reads with
)
from tensorboard.plugins.text.metadata import PLUGIN_NAME

from clara_jax.errors import UserError
from clara_jax.training import progress
from clara_jax.training.event_file import code_block
from clara_jax.training.metrics import MetricsLog, forget_after

TRAINING = {"loss": 1.23456, "learning_rate": 1e-4, "target_tokens_per_second": 3456.4, "step_seconds": 0.52}


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def read_board(run_dir: Path):
    return EventAccumulator(str(run_dir / "tensorboard")).Reload()


def test_every_number_is_in_the_file_with_all_its_digits(tmp_path):
    """If this broke, curves drawn from metrics.jsonl would lack points or digits."""
    with MetricsLog(tmp_path, 0, 10) as log:
        log.write(1, {"loss": 0.1 + 0.2, "texts_cut": 3})
        log.write(1, {"evaluation/loss": 1.5, "evaluation/recall@1": 1 / 3})
        # Written at once: a run that is killed has lost nothing that it logged.
        assert lines(tmp_path) == [
            {"step": 1, "loss": 0.1 + 0.2, "texts_cut": 3},
            {"step": 1, "evaluation/loss": 1.5, "evaluation/recall@1": 1 / 3},
        ]


def test_tensorboard_shows_scalars_and_text(tmp_path):
    """If this broke, TensorBoard would show no curves, no configuration or no samples."""
    config = code_block("batch_size: 4\n", "yaml")
    with MetricsLog(tmp_path, 0, 10) as log:
        log.write_text(0, "config", config)
        log.write(5, {"loss": 0.25, "evaluation/recall@1": 0.5})
        board = read_board(tmp_path)  # while the run goes on
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(5, 0.25)]
    assert [(event.step, event.value) for event in board.Scalars("evaluation/recall@1")] == [(5, 0.5)]
    assert board.Tensors("config")[0].tensor_proto.string_val == [b"```yaml\nbatch_size: 4\n```"]
    assert board.SummaryMetadata("config").plugin_data.plugin_name == PLUGIN_NAME


def test_a_code_block_holds_any_text():
    """If this broke, a generated answer with a code block in it would spoil the rest of the page."""
    assert code_block("a ``` b\n````\n") == "`````\na ``` b\n````\n`````"


def test_what_json_cannot_say_is_null(tmp_path):
    """If this broke, strict readers would refuse the file of a run that diverged."""
    with MetricsLog(tmp_path, 0, 10) as log:
        log.write(1, {"loss": math.nan, "grad_norm": -math.inf})
        log.write(2, {"loss": 0.5, "grad_norm": 2.0})
    assert lines(tmp_path)[0] == {"step": 1, "loss": None, "grad_norm": None}
    table = pandas.read_json(tmp_path / "metrics.jsonl", lines=True)
    assert table["loss"].isna().tolist() == [True, False]
    assert table["loss"].dtype == float
    assert math.isnan(read_board(tmp_path).Scalars("loss")[0].value)


def test_steps_taken_again_replace_the_old_ones(tmp_path):
    """If this broke, a run that was cut off after its last checkpoint would show some steps twice."""
    with MetricsLog(tmp_path, 0, 10) as log:
        log.write_text(0, "config", "text")
        for step in (1, 2, 3, 4):
            log.write(step, {"loss": float(step)})
    with MetricsLog(tmp_path, 2, 10) as log:
        for step in (3, 4, 5):
            log.write(step, {"loss": 10.0 * step})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
        (4, 40.0),
        (5, 50.0),
    ]
    read = [(event.step, event.value) for event in read_board(tmp_path).Scalars("loss")]
    assert read == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]
    served = ServedEvents(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in served.Tensors("loss")] == [1, 2, 3, 4, 5]
    assert [event.step for event in served.Tensors("config")] == [0]


@pytest.mark.parametrize("rest", [b'{"step": 2, "lo', b'{"step": 2}', b"\xff\xfe\n", b"null\n", b"\0\0\0\n", b"{}\n"])
def test_lines_that_are_not_whole_are_dropped(tmp_path, rest):
    """If this broke, a run could not go on after a power cut or a full disk."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1.0}\n' + rest)
    forget_after(path, 5)
    assert path.read_bytes() == b'{"step": 1, "loss": 1.0}\n'
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_only_the_enabled_log_writes(tmp_path, capsys):
    """If this broke, every host of a cluster would write into the same files."""
    with MetricsLog(tmp_path, 0, 10, enabled=False) as log:
        log.advance()
        log.write(1, TRAINING)
        log.write_text(1, "sample", "text")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_job_logs_get_plain_lines(tmp_path, capsys, monkeypatch):
    """If this broke, the log of a Slurm job or a pod would be one endless line of bars."""
    now = iter([100.0, 104.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with MetricsLog(tmp_path, 118, 1000) as log:
        for step in (119, 120, 121):
            log.advance()
            if step != 120:
                log.write(step, TRAINING)
        log.write(121, {"evaluation/recall@1": 0.5})
    assert capsys.readouterr().err.splitlines() == [
        "step 119/1000 loss 1.2346 lr 1.0e-04 3456 tok/s 0.52 s/step eta ?",
        "step 121/1000 loss 1.2346 lr 1.0e-04 3456 tok/s 0.52 s/step eta 29:18",
        "step 121/1000 evaluation/recall@1 0.5000",
    ]


def test_terminals_get_a_bar(tmp_path, monkeypatch):
    """If this broke, a person would see no progress."""
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", screen)
    with MetricsLog(tmp_path, 3, 10) as log:
        log.advance()
        log.write(4, TRAINING)
        log.write(4, {"evaluation/loss": 2.0})
    shown = screen.getvalue()
    assert "\r" in shown and "4/10" in shown
    assert "loss 1.2346 lr 1.0e-04 3456 tok/s 0.52 s/step" in shown
    assert "step 4/10 evaluation/loss 2.0000\n" in shown


@pytest.fixture
def fill_disk(monkeypatch):
    """Make files whose name contains a word take no more bytes, by the device that is always full."""

    def fill(word: str) -> None:
        really_open = Path.open

        def open_full(self, *args, **kwargs):
            return really_open(Path("/dev/full") if word in self.name else self, *args, **kwargs)

        monkeypatch.setattr(Path, "open", open_full)

    return fill


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("word", ["metrics.jsonl", "tfevents"])
def test_a_full_disk_is_said_in_one_line(tmp_path, fill_disk, word):
    """If this broke, a full disk would end a run with a traceback, or go on without its numbers."""
    fill_disk(word)
    message = f"run_dir {tmp_path} cannot be written \\(No space left on device\\)"
    with pytest.raises(UserError, match=message), MetricsLog(tmp_path, 0, 10) as log:
        log.write(1, TRAINING)


def test_a_disk_that_fills_up_later_is_noticed_at_the_next_write(tmp_path, monkeypatch):
    """If this broke, a run would go on for days without its curves."""
    with pytest.raises(UserError, match="No space left on device"), MetricsLog(tmp_path, 0, 10) as log:
        log.write(1, TRAINING)

        def refuse(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(log._board._records, "write", refuse)
        log.write_text(2, "sample", "text")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_the_first_error_is_the_one_that_is_reported(tmp_path, fill_disk):
    """If this broke, a full disk at the end would hide why the run stopped."""
    fill_disk("metrics.jsonl")
    with pytest.raises(KeyError), MetricsLog(tmp_path, 0, 10) as log:
        log._lines.write(b"still in the buffer")
        raise KeyError


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    """If this broke, a run directory that is not there would end in a traceback."""
    with pytest.raises(UserError, match=f"run_dir {tmp_path}/none cannot be written \\(No such file or directory\\)"):
        MetricsLog(tmp_path / "none", 0, 10)
