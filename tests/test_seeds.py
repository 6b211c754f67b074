"""The figures of several quickstarts come from where `clara_jax.train` and `clara_jax.evaluate` write them."""

import csv
import json

from clara_jax.evaluation.systems import SYSTEMS
from experiments.seeds.__main__ import COLUMNS, run_seed, write_results


def write(folder, recall: float, seconds: float) -> None:
    folder.mkdir(parents=True)
    found = {
        "answers": {system: {"em": 0.5, "f1": 0.5, "cover_em": 0.5} for system in SYSTEMS},
        "retrieval": {name: {"recall@1": recall, "recall@3": 1.0} for name in ("model", "bm25")},
        "seconds": seconds,
    }
    (folder / "results.json").write_text(json.dumps(found), encoding="utf-8")


def test_finished_runs_are_collected_and_the_least_is_told(tmp_path):
    for seed, recall in enumerate((0.9, 0.8)):
        write(tmp_path / f"seed_{seed}", recall, 200.0 + seed)
        write(tmp_path / f"seed_{seed}" / "before_end_to_end", recall / 2, 10.0)
    found = [run_seed(tmp_path / f"seed_{seed}", seed) for seed in (0, 1)]
    assert found[1]["recall@1"] == 80 and found[1]["recall@1_before"] == 40 and found[1]["seconds"] == 201
    write_results(found, tmp_path / "out")
    table = (tmp_path / "out" / "seeds.md").read_text(encoding="utf-8")
    assert "| recall@1 | 80.0 | 85.0 | 90.0 |" in table
    with (tmp_path / "out" / "seeds.csv").open(encoding="utf-8", newline="") as file:
        assert [set(row) for row in csv.DictReader(file)] == [{"seed", *COLUMNS}] * 2
    assert (tmp_path / "out" / "seeds.png").stat().st_size > 1000
