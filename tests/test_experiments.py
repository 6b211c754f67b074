"""Experiments take their figures from where `clara_jax.train` and `clara_jax.evaluate` write them."""

import csv
import json

from clara_jax.curriculum import parse_curriculum
from clara_jax.evaluation.systems import SYSTEMS
from experiments.end_to_end.__main__ import TABLES as of_end_to_end
from experiments.memories.__main__ import TABLES as of_memories
from experiments.results import draw_curves, write_results
from experiments.seeds.__main__ import run_seed
from experiments.tables import STAGES
from experiments.two_hop.__main__ import of_the_right_kind, write_questions


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


VARIANTS = [
    *(
        (stage, overrides)
        for table in of_memories.values()
        for variant in table.values()
        for stage, overrides in (
            ("compression_pretraining", {**variant.both, **variant.stage_1}),
            ("instruction_tuning", {**variant.both, **variant.stage_2}),
        )
    ),
    *(("end_to_end", overrides) for table in of_end_to_end.values() for overrides in table.values()),
]


def test_every_variant_is_a_run_that_can_be_asked_for():
    """A key that does not exist would stop a table after hours."""
    for stage, overrides in VARIANTS:
        arguments = [f"--{key}={value}" for key, value in overrides.items()]
        (run,) = parse_curriculum(["--config", str(STAGES / f"{stage}.yaml"), *arguments]).runs
        assert run.stage in (stage, overrides.get("stage"))


def test_the_bridging_document_is_the_one_that_has_the_answer(tmp_path):
    """If the two were confused, finding the document that the question names would count as the second hop."""
    write_questions(tmp_path)
    named, bridging = (
        [json.loads(line) for line in (tmp_path / f"{which}.jsonl").read_text(encoding="utf-8").splitlines()]
        for which in ("named", "bridging")
    )
    assert len(named) == len(bridging) == 200
    for one, other in zip(named, bridging, strict=True):
        assert one["question"] == other["question"] and one["pos_index"] != other["pos_index"]
        assert other["answer"] in other["docs"][other["pos_index"][0]]
    assert len((tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()) == 1000


def test_chance_knows_the_kind_of_the_bridging_document_and_no_more():
    """By it one tells a model that learned the second hop from one that learned which kind of thing is asked for."""
    found = of_the_right_kind()
    shares = [found[f"bridging, recall@{k}"] for k in (1, 3, 5)]
    assert 10 < shares[0] < shares[1] < shares[2] <= 100  # ten candidates, more than one of a kind
    assert found["named, recall@1"] < shares[0]  # it is seldom of that kind


def test_curves_of_runs_of_a_length_that_is_no_multiple_are_drawn(tmp_path):
    """25 steps of a shortened run, ten a point: the last point is of five."""
    rising = [float(step) for step in range(25)]
    curves = {"loss": {"one": [rising, rising[::-1]], "other": [rising, rising]}, "gradient_norm": {"one": [rising]}}
    draw_curves(curves, tmp_path / "curves.png", over=10)
    assert (tmp_path / "curves.png").stat().st_size > 1000
