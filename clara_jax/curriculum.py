"""Several stages in one file: each starts from the one before, and one that is finished is not run again.

    run_dir: runs/clara
    curriculum:
    - compression_pretraining.yaml        # a file beside this one, or
    - stage: end_to_end                   # the keys in which the stage differs from those above
      optimizer: {learning_rate: 5.0e-6}

Keys beside `curriculum` hold for every stage that does not name them itself; the command line holds for all.
"""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from clara_jax.config import TrainConfig, parse_train_config
from clara_jax.errors import fail

CURRICULUM = "curriculum"


def parse_runs(arguments: Sequence[str] | None = None) -> list[TrainConfig]:
    """The runs that a command line asks for: one, or those of its file's curriculum.

    Run n of a curriculum has the directory `run_dir/n_stage`. Raises `UserError` naming the key.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config")
    finder.add_argument("--run_dir")
    with contextlib.suppress(argparse.ArgumentError):
        found, _ = finder.parse_known_args(arguments)
        shared = _read_yaml(Path(found.config)) if found.config else {}
        if CURRICULUM in shared:
            return _parse_curriculum(Path(found.config), shared, found.run_dir, arguments)
    return [parse_train_config(arguments)]


def _parse_curriculum(
    path: Path, shared: dict[str, Any], run_dir: str | None, arguments: list[str]
) -> list[TrainConfig]:
    entries = shared.pop(CURRICULUM)
    run_dir = run_dir or shared.get("run_dir")
    if not isinstance(entries, list) or not entries:
        fail(f"{path}: curriculum is not a list of stages", "Give files, or stages with the keys that differ")
    if not isinstance(run_dir, str):
        fail(f"{path}: run_dir is missing", "Name a folder for the curriculum's runs")
    overrides = _without_config(arguments)
    runs: list[TrainConfig] = []
    printing = False
    for number, entry in enumerate(entries, 1):
        keys = _read_yaml(path.parent / entry) if isinstance(entry, str) else entry
        if not isinstance(keys, dict):
            fail(f"{path}: entry {number} of curriculum is {entry!r}", "Give a file, or keys of a stage")
        merged = _merged(shared, keys)
        own = [f"--run_dir={run_dir}/{number}_{merged.get('stage')}"]
        if runs and "start_from" not in (keys.get("model") or {}):
            own.append(f"--model.start_from={runs[-1].run_dir}")
        try:
            runs.append(parse_train_config([f"--config={yaml.safe_dump(merged)}", *overrides, *own]))
        except SystemExit:  # --help, or --print_config, which shows every stage
            if "--help" in arguments or "-h" in arguments:
                raise
            printing = True
            runs.append(parse_train_config([f"--config={yaml.safe_dump(merged)}", *_asking_nothing(overrides), *own]))
    if printing:
        sys.exit(0)
    return runs


def _merged(shared: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`own` over `shared`, key by key."""
    merged = dict(shared)
    for key, value in own.items():
        below = shared.get(key)
        merged[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _read_yaml(path: Path) -> dict[str, Any]:
    """The keys of a YAML file; {} where it is not one, which the parser of the configuration then says."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _without_config(arguments: list[str]) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != "--config" and not argument.startswith(("--config=", "--run_dir=")):
            kept.append(argument)
        skip = argument in ("--config", "--run_dir")
    return [argument for argument in kept if argument != "--run_dir"]


def _asking_nothing(arguments: list[str]) -> list[str]:
    return [argument for argument in arguments if not argument.startswith("--print_config")]
