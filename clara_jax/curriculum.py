"""Several stages in one file: each starts from the one before, and one that is finished is not run again.

    run_dir: runs/clara
    curriculum:
    - compression_pretraining.yaml        # a file beside this one, or
    - stage: end_to_end                   # the keys in which the stage differs from those above
      optimizer: {learning_rate: 5.0e-6}

Keys beside `curriculum` hold for every stage that does not name them itself; the command line holds for all.
`evaluation_at_end` beside them evaluates the last stage's model when all have finished:

    evaluation_at_end: {data: questions.jsonl, setting: end_to_end, k: 2}   # options of clara_jax.evaluate
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from clara_jax.command_line import parse
from clara_jax.config import TrainConfig, config_text, parse_train_config
from clara_jax.errors import UserError, fail
from clara_jax.evaluation.run import EvaluationSettings
from clara_jax.evaluation.systems import Decoding
from clara_jax.evaluation.task import EvaluationTask

CURRICULUM, EVALUATION = "curriculum", "evaluation_at_end"


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """What a command line asks for: runs in turn (perhaps only one), and an evaluation of the last one's model.

    `run_dir` holds all of it: that of the curriculum, or of the only run.
    """

    run_dir: str
    runs: tuple[TrainConfig, ...]
    evaluation: EvaluationTask | None = None


def parse_curriculum(arguments: Sequence[str] | None = None) -> Curriculum:
    """The curriculum of the command line's file, or the one run that it asks for.

    Run n of a curriculum has the directory `run_dir/n_stage`. Raises `UserError` naming the key.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config")
    finder.add_argument("--run_dir")
    try:
        found, others = finder.parse_known_args(arguments)
    except argparse.ArgumentError:  # which the parser of the configuration explains
        return _one_run(arguments)
    if found.config is None or {"-h", "--help"} & set(others):
        return _one_run(arguments)
    path = Path(found.config)
    shared = _read_yaml(path, "--config")
    if CURRICULUM not in shared:
        return _one_run(arguments)
    evaluation = _parse_evaluation(shared.pop(EVALUATION), f"{path}, {EVALUATION}") if EVALUATION in shared else None
    configs = list(_stages(path, shared, found.run_dir))
    printing = [argument for argument in others if argument.startswith("--print_config")]
    overrides = [argument for argument in others if argument not in printing]
    runs = tuple(_parse_stage(config, overrides, where) for config, where in configs)
    if printing:
        print("---\n".join(config_text(run) for run in runs), end="")
        sys.exit(0)
    return Curriculum(found.run_dir or shared["run_dir"], runs, evaluation)


def _one_run(arguments: list[str]) -> Curriculum:
    config = parse_train_config(arguments)
    return Curriculum(config.run_dir, (config,))


def _stages(path: Path, shared: dict[str, Any], run_dir: str | None) -> Iterator[tuple[dict[str, Any], str]]:
    """The keys of each stage, and what to call it in an error."""
    entries = shared.pop(CURRICULUM)
    run_dir = run_dir or shared.get("run_dir")
    if not isinstance(entries, list) or not entries:
        fail(f"{path}: curriculum is not a list of stages", "Give files, or stages with the keys that differ")
    if not isinstance(run_dir, str):
        fail(f"{path}: run_dir is missing", "Name a folder for the curriculum's runs")
    before = None
    for number, entry in enumerate(entries, 1):
        where = f"{path}, stage {number} of the curriculum"
        own = _read_yaml(path.parent / entry, where) if isinstance(entry, str) else entry
        if not isinstance(own, dict):
            fail(f"{where} is {entry!r}", "Give a file, or keys of a stage")
        stage = _merged(shared, own)
        model = dict(stage.get("model") or {})
        # A stage written out here may start from elsewhere; in a file of its own that key is for running it alone.
        if before is not None and (isinstance(entry, str) or "start_from" not in (own.get("model") or {})):
            model["start_from"] = before
        before = f"{run_dir}/{number}_{stage.get('stage')}"
        yield {**stage, "model": model, "run_dir": before}, where


def _parse_stage(stage: dict[str, Any], overrides: list[str], where: str) -> TrainConfig:
    try:
        return parse_train_config([f"--config={yaml.safe_dump(stage)}", *overrides])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _parse_evaluation(keys: Any, where: str) -> EvaluationTask:
    """The evaluation of those keys, which `where` names. Raises `UserError`."""
    if not isinstance(keys, dict):
        fail(f"{where} is {keys!r}", "Give keys, of which data names the questions")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--data", type=str, required=True)
    parser.add_argument("--limit", type=int | None, default=None)
    parser.add_argument("--corpus", type=tuple[str, ...] | None, default=None)
    parser.add_class_arguments(EvaluationSettings, skip={"dense"})
    parser.add_class_arguments(Decoding)
    kinds = EvaluationSettings, Decoding
    own = [[field.name for field in dataclasses.fields(kind) if field.name != "dense"] for kind in kinds]
    known = ["data", "limit", "corpus", *own[0], *own[1]]
    try:
        built = parse(parser, [f"--config={yaml.safe_dump(keys)}"], f"Its keys are {', '.join(known)}")
        settings, decoding = (kind(**{k: built[k] for k in names}) for kind, names in zip(kinds, own, strict=True))
        return EvaluationTask(built.data, settings, decoding, built.limit, built.corpus)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _merged(shared: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`own` over `shared`, key by key."""
    merged = dict(shared)
    for key, value in own.items():
        below = shared.get(key)
        merged[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _read_yaml(path: Path, where: str) -> dict[str, Any]:
    """The keys of a YAML file that `where` names. Raises `UserError`."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        fail(f"{where}: {path} cannot be read ({error.strerror})", "Check the path")
    except UnicodeDecodeError:
        fail(f"{where}: {path} is not UTF-8 text", "Give a YAML file")
    except yaml.YAMLError as error:
        fail(f"{where}: {path} is not YAML ({' '.join(str(error).split())})", "Correct that line")
    if not isinstance(content, dict):
        fail(f"{where}: {path} holds no keys", "Give a YAML file with the keys that --help lists")
    return content
