"""Experiments take their figures from where `clara_jax.train` and `clara_jax.evaluate` write them."""

import csv
import json

import pytest

from clara_jax.curriculum import parse_curriculum
from clara_jax.evaluation.systems import SYSTEMS
from experiments.ablations.__main__ import CONFIG, TABLES
from experiments.results import write_results
from experiments.seeds.__main__ import run_seed


def write(folder, recall: float, seconds: float) -> None:
    folder.mkdir(parents=True)
    found = {
        "answers": {system: {"em": 0.5, "f1": 0.5, "cover_em": 0.5} for system in SYSTEMS},
        "retrieval": {name: {"recall@1": recall, "recall@3": 1.0} for name in ("model", "bm25")},
        "seconds": seconds,
    }
    (folder / "results.json").write_text(json.dumps(found), encoding="utf-8")


def test_finished_seeds_are_collected_and_the_least_is_told(tmp_path):
    for seed, recall in enumerate((0.9, 0.8)):
        write(tmp_path / f"seed_{seed}", recall, 200.0 + seed)
        write(tmp_path / f"seed_{seed}" / "evaluation_of_stage_2", recall / 2, 10.0)
    found = [run_seed(tmp_path / f"seed_{seed}", seed) for seed in (0, 1)]
    assert (found[1]["stage 2, recall@1"], found[1]["stage 3, recall@1"], found[1]["seconds"]) == (40, 80, 201)
    table = write_results(found, tmp_path / "out", "seeds")
    assert "| stage 3, recall@1 | 85 (80 to 90) |" in table
    with (tmp_path / "out" / "seeds.csv").open(encoding="utf-8", newline="") as file:
        assert [row["stage 3, recall@1"] for row in csv.DictReader(file)] == ["90.0", "80.0"]
    assert (tmp_path / "out" / "seeds.png").stat().st_size > 1000


@pytest.mark.parametrize("table", TABLES)
def test_every_variant_is_a_run_that_can_be_asked_for(table):
    """A key that does not exist would stop the table after hours."""
    for overrides in TABLES[table].values():
        arguments = [f"--{key}={value}" for key, value in overrides.items()]
        (run,) = parse_curriculum(["--config", str(CONFIG), *arguments]).runs
        assert run.stage in ("end_to_end", "retrieval_pretraining")
