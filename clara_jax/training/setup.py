"""From a configuration to everything that a run consists of, with what is wrong with the input found first."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from clara_jax.cluster import is_main, main_first
from clara_jax.config import TrainConfig
from clara_jax.data import pipeline
from clara_jax.data.pipeline import Batches
from clara_jax.data.sources import check_source
from clara_jax.errors import fail
from clara_jax.models.roles import Params
from clara_jax.pretrained import Pretrained, special_rows
from clara_jax.scoring.retrieval_sums import retrieval_names
from clara_jax.sharding import local_rows, make_mesh, place, replicated
from clara_jax.training.candidates import CandidateMemories, store_candidates, uses_store
from clara_jax.training.evaluation import Evaluation
from clara_jax.training.objectives import Objective
from clara_jax.training.optimizer import make_optimizer, make_schedule
from clara_jax.training.runs import check_resumable, starting_model
from clara_jax.training.stages import STAGES, split_trainable
from clara_jax.training.state import TrainState, init_state
from clara_jax.training.step import Step, check_batch, make_step


@dataclasses.dataclass(frozen=True)
class Run:
    """A run before its first step.

    `frozen` are the parameters that the stage does not train; `others` is what of them a checkpoint holds, so that
    it is a whole model beside its base.
    """

    config: TrainConfig
    mesh: Mesh
    model: Pretrained
    batches: Batches
    steps: int
    step: Step
    schedule: optax.Schedule
    state: TrainState
    frozen: Params
    others: Params
    evaluation: Evaluation | None


def prepare(config: TrainConfig, report: Callable[[str], None]) -> Run:
    """Read model and data and put them on the mesh; nothing is written but caches.

    `report` is told a line on each source of data. Raises `UserError` for any input that does not fit.
    """
    report = report if is_main() else _unheard
    mesh = make_mesh(config.mesh)
    check(config)
    check_resumable(config, Path(config.run_dir))
    model = starting_model(config, mesh)
    params = {name: tree if name == "base" else _placed(tree, mesh) for name, tree in model.params.items()}
    batches = _training_batches(config, model, params, mesh, report)
    steps = config.steps or max(1, int(config.epochs * len(batches.data)) // config.batch_size)
    whole = replicated(mesh)
    trainable, frozen = split_trainable(params, config.trains)
    optimizer = make_optimizer(config.optimizer, steps)
    state = jax.tree.map(lambda leaf: place(leaf, whole), init_state(trainable, optimizer, config.seed))
    objective = STAGES[config.stage].objective(model.model, config.objective)
    others = {name: tree for name, tree in frozen.items() if name != "base"}
    others["special_rows"] = special_rows(model.params, model.tokenizer.special)
    return Run(
        config=config,
        mesh=mesh,
        model=model,
        batches=batches,
        steps=steps,
        step=make_step(objective, optimizer, mesh, config.micro_batches),
        schedule=make_schedule(config.optimizer, steps),
        state=state,
        frozen=frozen,
        others=others,
        evaluation=_evaluation(config, model, params, objective, mesh, report) if config.evaluation.path else None,
    )


def check(config: TrainConfig) -> None:
    """Refuse what can be seen without reading model or data, so that a later stage fails before the first is run."""
    mesh = make_mesh(config.mesh)
    check_batch(mesh, config.batch_size, config.micro_batches)
    for name in (*config.data.path, *config.evaluation.path):
        check_source(name)
    if config.evaluation.path:
        check_batch(mesh, _evaluation_batch_size(config), key="evaluation.batch_size")
        _check_keep_best(config)


def use_compilation_cache(folder: str) -> None:
    """Keep compiled programs in `folder`, unless jax has been told another place or `folder` is empty."""
    if folder and jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))


def _training_batches(
    config: TrainConfig, model: Pretrained, params: Params, mesh: Mesh, report: Callable[[str], None]
) -> Batches:
    data = _load(config, config.data, model, report)
    if config.stage == "retrieval_pretraining" and not any(data.sample(i).positives for i in range(len(data))):
        fail(
            f"none of the records of {', '.join(config.data.path)} has a pos_index, which {config.stage} learns from",
            "Mark the relevant docs of each question",
        )
    batches = pipeline.training_batches(
        data,
        config.batch_size,
        config.seed,
        config.data.length_classes,
        config.data.workers,
        local_rows(mesh, config.batch_size),
        _memories(config, model, params, data, mesh, report),
    )
    report(f"batch shapes: {len(batches.shapes)}, with {batches.expected_padding:.1%} of all columns padding")
    return batches


def _evaluation(
    config: TrainConfig,
    model: Pretrained,
    params: Params,
    objective: Objective,
    mesh: Mesh,
    report: Callable[[str], None],
) -> Evaluation:
    settings, size = config.evaluation, _evaluation_batch_size(config)
    data = _load(config, dataclasses.replace(config.data, path=settings.path, weights=None), model, report)
    rows = local_rows(mesh, size)
    memories = _memories(config, model, params, data, mesh, report)
    batches = pipeline.sequential_batches(data, size, config.data.workers, rows, settings.records, memories)
    answers = 0 if config.stage == "retrieval_pretraining" else settings.generate
    return Evaluation(model, objective, batches, mesh, config.objective.top_k, answers, settings.max_new_tokens)


def _memories(
    config: TrainConfig, model: Pretrained, params: Params, data: pipeline.Data, mesh: Mesh, report: Callable
) -> CandidateMemories | None:
    return store_candidates(config, model, params, data, mesh, report) if uses_store(config) else None


def _load(
    config: TrainConfig, data: pipeline.DataConfig, model: Pretrained, report: Callable[[str], None]
) -> pipeline.Data:
    """Tokenised data; the main process tokenises first, and the others find its work where they share a disk."""
    with main_first("tokenise"):
        return pipeline.load(
            data,
            model.tokenizer,
            STAGES[config.stage].samples,
            config.model.doc_max_length,
            config.objective.top_k,
            config.seed,
            report,
        )


def _evaluation_batch_size(config: TrainConfig) -> int:
    return config.evaluation.batch_size or max(1, config.batch_size // config.micro_batches)


def _check_keep_best(config: TrainConfig) -> None:
    known = [*("loss", "cross_entropy", "mse", "em", "f1", "cover_em"), *retrieval_names()]
    if config.keep_best is not None and config.keep_best.removeprefix("evaluation/") not in known:
        fail(f"keep_best is {config.keep_best}", f"Choose evaluation/ followed by one of {', '.join(known)}")


def _unheard(line: str) -> None:
    """The other processes read the same data; one report is enough."""


def _placed(tree: Any, mesh: Mesh) -> Any:
    return jax.tree.map(lambda leaf: place(leaf, replicated(mesh)), tree)
