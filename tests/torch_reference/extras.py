"""Checks of the small files beside the case folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from .compare import Report, compare_arrays
from .metrics import pair, retrieval
from .tables import prompt_entry, schedule, topk_results


def check_extras(root: Path) -> list[Report]:
    """Reports of those files that are present."""
    checks = {
        "prompts.json": _prompts,
        "topk.npz": _topk,
        "metrics.json": _metrics,
        "lr_schedule.json": _schedules,
    }
    return [check(root, root / name) for name, check in checks.items() if (root / name).is_file()]


def _prompts(root: Path, path: Path) -> Report:
    report = Report(path.name)
    for key, stored in json.loads(path.read_text(encoding="utf-8")).items():
        found = prompt_entry(root, key, stored["encoder"]["texts"], stored["questions"], stored["answers"])
        report.same(f"{key} keys", sorted(found), sorted(stored))
        for part in found:
            names = found[part] if isinstance(found[part], dict) else {}
            for name in names:
                report.same(f"{key} {part} {name}", found[part][name], stored[part].get(name))
            report.same(
                f"{key} {part}",
                list(found[part]) if names else found[part],
                list(stored[part]) if names else stored[part],
            )
    return report


def _topk(root: Path, path: Path) -> Report:
    stored = dict(np.load(path))
    inputs = {k: stored.pop(k) for k in list(stored) if k.endswith(("logits", "cotangent")) and "dlogits" not in k}
    return compare_arrays(path.name, topk_results(inputs), stored)


def _metrics(root: Path, path: Path) -> Report:
    report = Report(path.name)
    stored = json.loads(path.read_text(encoding="utf-8"))
    for entry in stored["pairs"]:
        found = pair(entry["prediction"], entry["ground_truth"])
        report.same(repr((entry["prediction"], entry["ground_truth"])), found, entry)
    for i, entry in enumerate(stored["retrieval"]):
        found = retrieval(entry["pos"], entry["pred"], entry["k_values"])
        report.same(f"retrieval {i}", found, entry)
    return report


def _schedules(root: Path, path: Path) -> Report:
    report = Report(path.name)
    for entry in json.loads(path.read_text(encoding="utf-8")):
        found = schedule(*(entry[k] for k in ("name", "lr", "warmup_ratio", "warmup_steps", "total_steps")))
        rates = [np.asarray(e.pop("lr_used_at_step")) for e in (found, entry)]
        report.same(entry["name"], found, entry)
        report.close("losses", entry["name"], *rates)
    return report
