"""A training run as frozen dataclasses, read from YAML with dotted command-line overrides.

jsonargparse does the reading: it checks types against these very dataclasses, takes its help from their
docstrings, and knows `--config`, `--print_config` and nested overrides, so that no key is written down twice.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jsonargparse

from clara_jax.data.records import BadRecordPolicy
from clara_jax.errors import UserError, fail
from clara_jax.models.decoder import RematPolicy
from clara_jax.models.lora import LoraConfig
from clara_jax.training.objectives import ObjectiveConfig
from clara_jax.training.optimizer import OptimizerConfig
from clara_jax.training.stages import STAGES, StageName


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The frozen base model and the shape of a memory.

    Args:
        base: Base model, a Hugging Face folder, a folder made by `clara_jax.convert base`, or a hub id.
        start_from: Run directory or CLaRa checkpoint whose adapters training starts from (default: new ones).
        doc_max_length: Longest document in tokens; what is longer is cut.
        compression_rate: Document tokens per memory token.
        dtype: Compute type; auto is float32 on the CPU and bfloat16 on an accelerator.
        remat: What the backward pass keeps of each layer; the rest is computed again.

    """

    base: str
    start_from: str | None = None
    doc_max_length: int = 256
    compression_rate: int = 32
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: RematPolicy = "everything"

    def __post_init__(self) -> None:
        if not 1 <= self.compression_rate <= self.doc_max_length:
            fail(
                f"model.compression_rate is {self.compression_rate} for documents of {self.doc_max_length} tokens",
                "Choose a rate between 1 and model.doc_max_length",
            )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Training records.

    Args:
        path: JSON Lines files.
        on_bad_record: Stop at a malformed record, or skip and count it.
        question_max_length: Longest question in tokens for the query reasoner.
        prompt_max_length: Longest prompt with answer in tokens for the generator.

    """

    path: list[str]
    on_bad_record: BadRecordPolicy = "stop"
    question_max_length: int = 256
    prompt_max_length: int = 1024


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Args:
        run_dir: Folder for checkpoints, metrics and TensorBoard. A run that stopped goes on from its last checkpoint.
        stage: What is trained and by which loss.
        model: The frozen base model and the shape of a memory.
        data: Training records.
        lora: Low-rank adaptation of every linear layer.
        objective: Weights and choices of the losses.
        optimizer: How parameters are updated.
        trainable: Subtrees to train instead of the stage's own (compressor, query_reasoner, generator, memory_tokens).
        batch_size: Records per optimizer step.
        steps: Optimizer steps.
        seed: Seed of new parameters, of the order of records and of dropout.
        log_every: Steps between two lines of metrics.
        checkpoint_every: Steps between two checkpoints; the last step always gets one.
        keep_checkpoints: Number of latest checkpoints to keep.

    """

    run_dir: str
    stage: StageName
    model: ModelConfig
    data: DataConfig
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    trainable: list[str] | None = None
    batch_size: int = 128
    steps: int = 1000
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 500
    keep_checkpoints: int = 3

    def __post_init__(self) -> None:
        for key in ("batch_size", "steps", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, key) < 1:
                fail(f"{key} is {getattr(self, key)}", "Give at least 1")

    @property
    def trains(self) -> tuple[str, ...]:
        """The subtrees that this run trains."""
        return STAGES[self.stage].trains if self.trainable is None else tuple(self.trainable)


def parse_train_config(arguments: Sequence[str] | None = None) -> TrainConfig:
    """The configuration of `--config FILE` with `--key.subkey VALUE` overrides, checked.

    Raises `UserError` naming the key for anything that does not fit.
    """
    parser = _parser()
    try:
        parsed = parser.parse_args(arguments)
        built = parser.instantiate(parsed)
    except (argparse.ArgumentError, jsonargparse.ArgumentError) as error:
        raise UserError(f"{_one_line(error)} Run with --help for every key.") from None
    except UnicodeDecodeError:
        fail("the --config file is not UTF-8 text", "Give a YAML file")
    fields = {field.name: built[field.name] for field in dataclasses.fields(TrainConfig)}
    return TrainConfig(**fields)


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the resolved configuration as YAML that `--config` reads again."""
    parser = _parser()
    path.write_text(parser.dump(parser.parse_object(dataclasses.asdict(config))), encoding="utf-8")


def load_config(path: Path) -> TrainConfig:
    """Read a configuration that `save_config` wrote."""
    return parse_train_config(["--config", str(path)])


def _parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog="python -m clara_jax.train",
        description="Train one stage of CLaRa.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below.")
    parser.add_class_arguments(TrainConfig)
    return parser


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if text.endswith(".") else text + "."
