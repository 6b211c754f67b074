"""Recompute recorded cases: ``python -m tests.torch_reference.check FOLDER``.

FOLDER holds case folders (those with a ``tokens.json``) and, where present,
``topk.npz``, ``prompts.json``, ``metrics.json`` and ``lr_schedule.json``.
Exits with status 1 if anything disagrees.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from .checkpoint import load
from .compare import Report, compare_arrays
from .extras import check_extras
from .generation import run_entry_point
from .reload import layout, reload_checks
from .stage_arrays import STAGE_FILES, reasoning_file, stage_file, to_numpy


def read_json(path: Path) -> Any:
    """Content of a json file."""
    return json.loads(path.read_text(encoding="utf-8"))


def check_stage(root: Path, case: str, name: str) -> Report:
    """One of the training stage files."""
    record, stored = read_json(root / case / f"{name}.json"), dict(np.load(root / case / f"{name}.npz"))
    n_logits = len(stored["logits_sel"]) if "logits_sel" in stored else 0
    arrays, facts = stage_file(root, name, record, n_logits, len(stored["enc_last_hidden"]))
    report = Report(f"{case}/{name}")
    drop_untrained(root, record, arrays, stored, report)
    compare_arrays(report.name, arrays, stored, report)
    for key, value in facts.items():
        if isinstance(value, float):
            continue
        report.same(key, value, record.get(key))
    return report


def drop_untrained(
    root: Path, record: dict[str, Any], arrays: dict[str, np.ndarray], stored: dict[str, np.ndarray], report: Report
) -> None:
    """Set ``trained::`` arrays aside if the recording holds the checkpoint's own values there.

    The recorded losses after each step still check the optimizer in that case.
    """
    keys = [key for key in stored if key.startswith("trained::")]
    model = load(root, record["checkpoint"])
    start = {
        f"trained::{adapter}::{name}": to_numpy(parameter)
        for adapter in model.adapters
        for name, parameter in model.parameters_of(adapter).items()
    }
    if keys and all(np.array_equal(stored[key], start[key]) for key in keys):
        report.notes.append(f"{len(keys)} recorded trained:: arrays equal the checkpoint, not compared")
        for key in keys:
            del stored[key]
            arrays.pop(key, None)


def check_reasoning(root: Path, case: str) -> Report:
    """The hand-made batch with different document counts."""
    name = "stage2_reasoning_forward"
    record = read_json(root / case / f"{name}.json")
    return compare_arrays(f"{case}/{name}", reasoning_file(root, record), np.load(root / case / f"{name}.npz"))


def check_generation(root: Path, case: str) -> Report:
    """Every entry point of ``generation.json``."""
    stored = np.load(root / case / "generation.npz")
    arrays: dict[str, np.ndarray] = {}
    report = Report(f"{case}/generation")
    for name, record in read_json(root / case / "generation.json").items():
        found = run_entry_point(load(root, record["checkpoint"]), name, record)
        for key, value in found.items():
            if isinstance(value, torch.Tensor):
                arrays[f"{name}::{key}"] = to_numpy(value)
            else:
                report.same(f"{name}::{key}", value, record[key])
    return compare_arrays(report.name, arrays, stored, report)


def check_tokens(root: Path, case: str) -> Report:
    """Special tokens, checkpoint layout and the outcome of reloading."""
    report = Report(f"{case}/tokens+checkpoints")
    tokens = read_json(root / case / "tokens.json")["tokens"]
    report.same("tokens", load(root, f"{case}/ckpt_stage1").tokenizer.describe(), tokens)
    recorded = read_json(root / case / "checkpoints.json")
    report.same("layout", layout(root, case), recorded["layout"])
    checks = reload_checks(root, case)
    for stage, values in recorded["reload_checks"].items():
        for key, value in values.items():
            if isinstance(value, float):
                report.close("losses", key, np.asarray(checks[stage][key]), np.asarray(value))
            else:
                report.same(f"{stage}.{key}", checks[stage][key], value)
    return report


def check_case(root: Path, case: str) -> int:
    """Print one line per file of a case; the number of files that disagree."""
    failed = check_tokens(root, case).print()
    for name in STAGE_FILES:
        failed += check_stage(root, case, name).print()
    return failed + check_reasoning(root, case).print() + check_generation(root, case).print()


def main() -> int:
    """Check a folder of cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--case", action="append", help="only this case folder (may be repeated)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    root = options.folder
    cases = options.case or sorted(p.parent.name for p in root.glob("*/tokens.json"))
    failed = sum(check_case(root, case) for case in cases)
    if not options.case:
        failed += sum(report.print() for report in check_extras(root))
    print("all agree" if not failed else f"{failed} file(s) disagree")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
