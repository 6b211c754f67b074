"""`python -m clara_jax.train`: what it writes, how it goes on, and what it says to wrong input."""

import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from clara_jax import train as train_command
from clara_jax.clara import Clara
from clara_jax.config import load_config, parse_train_config
from clara_jax.errors import UserError, run_command
from clara_jax.training.checkpoint import restore_adapters
from clara_jax.training.loop import train
from tests.conftest import FIXTURES

BASE = FIXTURES / "mistral_window" / "base"
RECORDS = [
    {"question": [f"Who built mill {i}?"], "answers": [f"Dronor {i}"], "docs": [f"Mill {i} was built by Dronor {i}."]}
    for i in range(12)
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    return path


def arguments(run_dir: Path, data: Path, *overrides: str) -> list[str]:
    settings = {
        "run_dir": run_dir,
        "stage": "compression_pretraining",
        "model.base": BASE,
        "model.doc_max_length": 32,
        "model.compression_rate": 8,
        "data.path": f"[{data}]",
        "lora.rank": 2,
        "batch_size": 4,
        "steps": 4,
        "log_every": 1,
        "checkpoint_every": 2,
        "optimizer.learning_rate": 0.01,
        "mesh.data": 1,
        "data.cache_dir": run_dir.parent / "tokens",
    }
    return [f"--{key}={value}" for key, value in settings.items()] + list(overrides)


def test_train_writes_a_run_that_loads_and_goes_on_bit_for_bit(tmp_path: Path, data: Path):
    """An interrupted run must end exactly where an uninterrupted one does, and be usable afterwards."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    last = train(parse_train_config(arguments(whole, data))).loss
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["loss"] == last < lines[0]["loss"]
    assert {"learning_rate", "padding_share", "target_tokens_per_second"} <= set(lines[0])
    assert list((whole / "tensorboard").glob("events*"))
    assert load_config(whole / "config.yaml") == parse_train_config(arguments(whole, data))

    train(parse_train_config(arguments(parts, data)))
    shutil.rmtree(parts / "checkpoints" / "4")  # as if killed before its last save
    assert train(parse_train_config(arguments(parts, data))).loss == last
    assert len((parts / "metrics.jsonl").read_text().splitlines()) == 4
    for mine, expected in zip(jax.tree.leaves(restore_adapters(parts)), jax.tree.leaves(restore_adapters(whole))):
        np.testing.assert_array_equal(mine, expected)

    clara = Clara.from_pretrained(whole)
    memories = clara.compress([RECORDS[0]["docs"][0]])
    assert memories.shape == (1, 4, 24) and len(clara.generate(["Who?"], memories[None], 3).texts) == 1


def test_train_one_step_of_every_retrieval_stage(tmp_path: Path):
    """End-to-end and contrastive training run on records with different numbers of candidates, all below k."""
    path = tmp_path / "data.jsonl"
    rows = [
        {"question": "Who?", "answer": "Dronor", "docs": ["a mill", "Dronor", "oil"][: 1 + i % 3], "pos_index": [0]}
        for i in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for stage in ("end_to_end", "retrieval_pretraining"):
        more = (f"--stage={stage}", "--steps=1", "--objective.top_k=4", "--objective.estimator=gumbel")
        assert np.isfinite(train(parse_train_config(arguments(tmp_path / stage, path, *more))).loss)


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("--batchsize=3", "batchsize"),
        ("--stage=pretraining", "stage"),
        ("--steps=0", "steps"),
        ("--lora.rank=x", "lora.rank"),
        ("--lora.rank=0", "lora.rank"),
        ("--lora.dropout=1", "lora.dropout"),
        ("--optimizer.learning_rate=-1", "optimizer.learning_rate"),
        ("--model.compression_rate=64", "model.compression_rate"),
        ("--model.base=/nowhere", "/nowhere"),
        ("--data.path=[/nowhere.jsonl]", "/nowhere.jsonl"),
        ("--trainable=[base]", "'base' cannot be trained"),
        ("--batch_size=13", "batch_size is 13"),
        ("--model.start_from=/nowhere", "/nowhere"),
        ("--config=/nowhere.yaml", "/nowhere.yaml"),
        ("--run_dir=gs://bucket/run", "gs://bucket/run"),
        ("--objective.top_k=0", "objective.top_k"),
        ("--objective.temperature=0", "objective.temperature"),
        ("--optimizer.clip_norm=0", "optimizer.clip_norm"),
        ("--optimizer.beta2=1", "optimizer.beta2"),
        ("--lora.alpha=-1", "lora.alpha"),
        ("--profile=[3,2]", "profile"),
        ("--micro_batches=3", "micro_batches"),
        ("--mesh.fsdp=16", "mesh"),
        ("--keep_best=evaluation/loss", "evaluation.path"),
        ("--evaluation.path=[/nowhere.parquet]", "/nowhere.parquet"),
        ("--model.start_fresh=[base]", "model.start_fresh"),
    ],
)
def test_train_refuses_wrong_input_before_writing(tmp_path, data, monkeypatch, capsys, override, names):
    """One line that names the key or file, exit status 2, and no run directory."""
    run_dir = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["train", *arguments(run_dir, data, override)])
    with pytest.raises(SystemExit) as stopped:
        run_command(train_command.main)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and names in error
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"modle: {base: x}", "modle"),
        (b"model: {base: x, rate: 3}", "rate"),
        (b"stage: end_to_end", "run_dir"),
        (b"run_dir: [x", "parsing config"),
        (b"\xff\xfe", "UTF-8"),
    ],
)
def test_wrong_config_file_is_refused_by_key(tmp_path: Path, content: bytes, names: str):
    """A key that does not exist, one that is missing, and a file that is not YAML."""
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=names):
        parse_train_config(["--config", str(path)])


def test_train_refuses_to_go_on_with_another_base(tmp_path: Path, data: Path):
    """A run's adapters are worth nothing on another base model."""
    train(parse_train_config(arguments(tmp_path / "run", data)))
    other = FIXTURES / "phi3_default" / "base"
    with pytest.raises(UserError, match="fingerprint"):
        train(parse_train_config(arguments(tmp_path / "run", data, f"--model.base={other}")))


def test_bad_record_is_named_or_skipped(tmp_path: Path, data: Path, capsys):
    """A malformed line stops the run with file, line and field, or is counted."""
    with data.open("a", encoding="utf-8") as file:
        file.write('{"question": ["a"], "answers": ["b"], "docs": "not a list"}\n')
    with pytest.raises(UserError, match=r"data.jsonl, line 13: field 'docs' must be a list of texts"):
        train(parse_train_config(arguments(tmp_path / "stop", data)))
    train(parse_train_config(arguments(tmp_path / "skip", data, "--data.on_bad_record=skip")))
    assert "12 samples, 1 skipped (first: line 13" in capsys.readouterr().out


def evaluations(run_dir: Path) -> dict[int, dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "evaluation/loss" in line}


def kept(run_dir: Path) -> list[int]:
    return sorted(int(folder.name) for folder in (run_dir / "checkpoints").iterdir())


def test_evaluation_is_logged_and_its_best_checkpoint_kept(tmp_path: Path):
    """Whoever trains past the best model must still have it, and see how it answered."""
    rows = [
        {"question": f"Who built {i}?", "answer": "Dronor", "docs": [f"Mill {i}", "Dronor", "oil"], "pos_index": [1]}
        for i in range(6)
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run_dir = tmp_path / "run"
    more = (
        "--stage=end_to_end",
        "--objective.top_k=2",
        "--steps=6",
        "--keep_checkpoints=1",
        "--keep_best=evaluation/loss",
    )
    watched = (f"--evaluation.path=[{path}]", "--evaluation.every=2", "--evaluation.max_new_tokens=4")
    train(parse_train_config(arguments(run_dir, path, *more, *watched)))
    found = evaluations(run_dir)
    assert sorted(found) == [2, 4, 6]
    assert {"evaluation/recall@1", "evaluation/precision@5", "evaluation/em", "evaluation/f1"} <= set(found[6])
    best = min(found, key=lambda step: found[step]["evaluation/loss"])
    assert kept(run_dir) == sorted({best, 6})
    # A run that goes on must not forget which one was the best.
    assert train(parse_train_config(arguments(run_dir, path, *more, *watched, "--steps=7"))).step == 7
    found = evaluations(run_dir)
    best = min(found, key=lambda step: found[step]["evaluation/loss"])
    assert kept(run_dir) == sorted({best, 7})
    assert Clara.from_pretrained(run_dir / "checkpoints" / str(best)).compress(["Mill 1"]).shape == (1, 4, 24)
    texts = b"".join(file.read_bytes() for file in (run_dir / "tensorboard").iterdir())
    assert b"evaluation/answers" in texts and b"| prompt | generated | accepted |" in texts
