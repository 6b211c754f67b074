"""The training loop: dispatch a step, then log the one before, so that logging never makes the device wait."""

import time
from collections.abc import Iterator
from pathlib import Path

import jax

from clara_jax.config import TrainConfig, save_config
from clara_jax.data import pipeline
from clara_jax.data.pipeline import Counted
from clara_jax.data.records import Record, read_jsonl
from clara_jax.data.samples import Limits
from clara_jax.errors import UserError, fail
from clara_jax.models.roles import Params
from clara_jax.pretrained import Pretrained, special_rows
from clara_jax.training.checkpoint import Checkpoints, write_base_fingerprint
from clara_jax.training.metrics import MetricsLog
from clara_jax.training.objectives import Metrics
from clara_jax.training.optimizer import make_optimizer, make_schedule
from clara_jax.training.runs import starting_model
from clara_jax.training.stages import STAGES, split_trainable
from clara_jax.training.state import TrainState, init_state
from clara_jax.training.step import Step, make_step


def train(config: TrainConfig) -> float:
    """Run (or go on with) a training run and return its last loss.

    Everything that can be wrong with the input is found before the run directory is made.
    """
    run_dir = Path(config.run_dir)
    records = _read_records(config)
    model = starting_model(config)
    trainable, frozen = split_trainable(model.params, config.trains)
    optimizer = make_optimizer(config.optimizer, config.steps)
    objective = STAGES[config.stage].objective(model.model, config.objective)
    step = make_step(objective, optimizer)
    state = init_state(trainable, optimizer, config.seed)
    others = {name: tree for name, tree in frozen.items() if name != "base"}
    others["special_rows"] = special_rows(model.params, model.tokenizer.special)

    _make_run_dir(run_dir, config, model)
    checkpoints = Checkpoints(run_dir, config.keep_checkpoints)
    if checkpoints.latest is not None:
        state = checkpoints.restore(state)
    first = int(state.step)
    if first >= config.steps:
        fail(f"{run_dir} has already taken {first} of {config.steps} steps", "Raise steps, or name a new run_dir")
    limits = Limits(config.model.doc_max_length, config.data.question_max_length, config.data.prompt_max_length)
    dataset = pipeline.batches(
        records,
        model.tokenizer,
        limits,
        STAGES[config.stage].samples,
        config.objective.top_k,
        config.batch_size,
        config.seed,
    )
    devices = jax.devices()
    print(
        f"{config.stage} on {len(devices)} x {devices[0].device_kind}: steps {first + 1} to {config.steps} "
        f"of {config.batch_size} records"
    )
    with MetricsLog(run_dir, first, config.steps) as log:
        try:
            batches = pipeline.iterate(dataset, first)
            loss = _run(config, state, frozen, others, step, batches, log, checkpoints)
        finally:
            checkpoints.close()
    return loss


def _run(
    config: TrainConfig,
    state: TrainState,
    frozen: Params,
    others: Params,
    step: Step,
    batches: Iterator[Counted],
    log: MetricsLog,
    checkpoints: Checkpoints,
) -> float:
    schedule = make_schedule(config.optimizer, config.steps)
    pending: tuple[int, Metrics, Counted] | None = None
    loss, since = float("nan"), time.perf_counter()

    def report() -> None:
        nonlocal loss, since
        assert pending is not None
        number, metrics, counted = pending
        values = {name: float(value) for name, value in metrics.items()}
        now = time.perf_counter()
        seconds, since = now - since, now
        loss = values["loss"]
        log.advance()
        if number % config.log_every == 0 or number == config.steps:
            log.write(
                number,
                {
                    **values,
                    "learning_rate": float(schedule(number - 1)),
                    "step_seconds": seconds,
                    "target_tokens_per_second": counted.target_tokens / seconds,
                    "document_tokens_per_second": counted.document_tokens / seconds,
                    "padding_share": counted.padding,
                    "texts_cut": counted.cut,
                },
            )

    for number in range(int(state.step) + 1, config.steps + 1):
        counted = next(batches)
        state, metrics = step(state, frozen, counted.batch)
        if pending is not None:
            report()
        pending = (number, metrics, counted)
        if number % config.checkpoint_every == 0 or number == config.steps:
            checkpoints.save(state, others)
    if pending is not None:
        report()
    return loss


def _read_records(config: TrainConfig) -> list[Record]:
    records: list[Record] = []
    for name in config.data.path:
        found, skipped = read_jsonl(Path(name), config.data.on_bad_record)
        records += found
        if skipped:
            print(f"{name}: skipped {skipped} bad records, kept {len(found)}")
    if len(records) < config.batch_size:
        fail(
            f"data.path holds {len(records)} records, batch_size is {config.batch_size}",
            "Give more data or a smaller batch_size",
        )
    if config.stage != "compression_pretraining" and any(not record.questions for record in records):
        fail(f"data.path holds records without a question, which stage {config.stage} needs", "Filter them out")
    return records


def _make_run_dir(run_dir: Path, config: TrainConfig, model: Pretrained) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_base_fingerprint(run_dir, model.base_folder)
        save_config(config, run_dir / "config.yaml")
    except OSError as error:
        raise UserError(f"run_dir {run_dir} cannot be written ({error.strerror}). Name another run_dir.") from None
