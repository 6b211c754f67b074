"""A curriculum and the evaluation at its end: what is refused before training, what it leaves, where its model is."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from clara_jax import train as train_command
from clara_jax.clara import Clara
from clara_jax.curriculum import parse_curriculum
from clara_jax.errors import UserError
from clara_jax.training.checkpoint import restore_adapters
from clara_jax.training.runs import load_model, starting_model
from tests.conftest import FIXTURES, ROOT

QUESTIONS = [
    {"question": f"Who built mill {i}?", "answer": f"Dronor {i}", "docs": [f"Mill {i} is Dronor {i}'s.", f"Sea {i}."],
     "pos_index": [0]} for i in range(6)
]  # fmt: skip
COMPRESSION = [
    {"question": [one["question"]], "answers": [one["answer"]], "docs": one["docs"][:1]} for one in QUESTIONS
]
SYSTEMS = ["memory", "text"]


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def curriculum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Run `clara_jax.train` on a curriculum with these keys of the evaluation; what it prints."""
    pairs = write(tmp_path / "questions.jsonl", QUESTIONS)
    content = {
        "run_dir": str(tmp_path / "run"),
        "model": {"base": str(FIXTURES / "mistral_window" / "base"), "doc_max_length": 32, "compression_rate": 8},
        "data": {"cache_dir": str(tmp_path / "tokens"), "path": [pairs]},
        "lora": {"rank": 2},
        "mesh": {"data": 1},
        "batch_size": 4,
        "steps": 1,
        "curriculum": [
            {
                "stage": "compression_pretraining",
                "data": {"path": [write(tmp_path / "compression.jsonl", COMPRESSION)]},
            },
            {"stage": "end_to_end", "objective": {"top_k": 1}},
        ],
    }

    def command(**changes) -> str:
        asked = {"data": pairs, "setting": "end_to_end", "k": 1, "max_new_tokens": 3, "limit": 5, "systems": SYSTEMS}
        path = tmp_path / "curriculum.yaml"
        path.write_text(yaml.safe_dump(content | {"evaluation_at_end": asked | changes}), encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["train", f"--config={path}"])
        train_command.main()
        return capsys.readouterr().out

    return command


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kk": 2}, r"curriculum\.yaml, evaluation_at_end: .*kk.* Its keys are data, limit, corpus, setting, .*"),
        ({"k": 0}, r"curriculum\.yaml, evaluation_at_end: k is 0"),
        ({"k": "two"}, r'curriculum\.yaml, evaluation_at_end: .*"k"'),
        ({"limit": 0}, r"curriculum\.yaml, evaluation_at_end: limit is 0"),
        ({"systems": ["magic"]}, r"curriculum\.yaml, evaluation_at_end: systems: there is no system magic"),
        ({"setting": "best"}, r'curriculum\.yaml, evaluation_at_end: .*"setting"'),
        ({"data": "nowhere.jsonl"}, r"nowhere\.jsonl"),
        ({"retriever": "given", "pool": "all"}, "own order"),
    ],
)
def test_mistakes_are_named_before_the_first_stage(curriculum, tmp_path: Path, changes: dict, message: str):
    """Who has trained for hours must not learn then that a key was wrong."""
    with pytest.raises(UserError, match=message) as raised:
        curriculum(**changes)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("package", ["matplotlib", "bm25s"])
def test_missing_packages_are_named_before_the_first_stage(curriculum, tmp_path: Path, monkeypatch, package: str):
    """They are an extra, which training alone does not need."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"the package {package}, which is not installed"):
        curriculum()
    assert not (tmp_path / "run").exists()


def assert_second_starts_from_first(path: Path):
    """Stage 3 must start from what stage 1 has learned: its query reasoner is the trained compressor."""
    first, second = parse_curriculum([f"--config={path}"]).runs
    trained = restore_adapters(Path(first.run_dir))
    assert "query_reasoner" not in trained
    start = starting_model(second).params
    for name in ("compressor", "query_reasoner"):
        for mine, theirs in zip(jax.tree.leaves(start[name]), jax.tree.leaves(trained["compressor"])):
            np.testing.assert_array_equal(mine, theirs)
    fresh = starting_model(
        dataclasses.replace(second, model=dataclasses.replace(second.model, start_fresh=["generator"]))
    )
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(fresh.params["generator"]) if leaf.shape[1] == 2)


def test_it_goes_from_stage_to_stage_and_ends_with_results_once(curriculum, tmp_path: Path):
    """One command from data to numbers; given again it does nothing."""
    run = tmp_path / "run"
    printed = curriculum()
    assert_second_starts_from_first(tmp_path / "curriculum.yaml")
    results = json.loads((run / "results.json").read_text())
    assert results.keys() == {"answers", "retrieval", "seconds"} and results["seconds"] > 0
    assert results["answers"].keys() == set(SYSTEMS) and results["retrieval"].keys() == {"model", "bm25"}
    assert all(scores.keys() == {"em", "f1", "cover_em"} for scores in results["answers"].values())
    assert all(0 <= scores["recall@1"] <= 1 for scores in results["retrieval"].values())
    whole = json.loads((run / "evaluation" / "results.json").read_text())
    assert {name: whole[name] for name in ("answers", "retrieval")} == {n: results[n] for n in ("answers", "retrieval")}
    assert whole["settings"]["model"] == str(run / "2_end_to_end") and whole["counts"]["questions"] == 5
    assert printed.count("Question: ") == printed.count("\nAnswer (memory): ") == 3
    assert "\nAccepted: Dronor 0\n" in printed and "\n1. " in printed
    assert printed.splitlines()[-2:] == [
        f"Report: {run / 'evaluation' / 'report.html'}",
        f"Curves: tensorboard --logdir {run}",
    ]
    assert (run / "evaluation" / "report.html").exists()

    found = Clara.from_pretrained(run)
    assert "query_reasoner" in found.loaded.params and found.top_k == 1

    (run / "evaluation" / "report.html").unlink()
    printed = curriculum()
    assert printed.count("has already taken its 1 steps") == 2
    again = printed.splitlines()
    assert again[-2].startswith(f"Results: {run / 'results.json'} is there already") and "Curves" in again[-1]
    assert json.loads((run / "results.json").read_text()) == results
    (run / "results.json").unlink()
    curriculum(systems=["memory"])
    assert json.loads((run / "results.json").read_text())["answers"].keys() == {"memory"}
    assert (run / "evaluation" / "report.html").exists()


def test_a_folder_without_finished_stages_is_refused(tmp_path: Path):
    """A curriculum that has saved nothing yet has no model."""
    (tmp_path / "1_end_to_end" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"neither a run directory .* nor that of a curriculum"):
        load_model(tmp_path)


def test_one_run_has_no_evaluation_at_end():
    """A file without `curriculum` stays a single run."""
    config = ROOT / "configs" / "quickstart" / "instruction_tuning.yaml"
    found = parse_curriculum([f"--config={config}", "--run_dir=elsewhere"])
    assert found.run_dir == "elsewhere" and len(found.runs) == 1 and found.evaluation is None
