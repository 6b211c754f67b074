"""A training run as frozen dataclasses, read from YAML with dotted command-line overrides.

jsonargparse does the reading: it checks types against these very dataclasses, takes its help from their
docstrings, and knows `--config`, `--print_config` and nested overrides, so that no key is written down twice.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jsonargparse

from clara_jax.cluster import ClusterConfig
from clara_jax.command_line import parse
from clara_jax.data.pipeline import DataConfig
from clara_jax.errors import fail
from clara_jax.files import replace_text
from clara_jax.models.attention import AttentionName
from clara_jax.models.lora import LoraConfig
from clara_jax.models.remat import RematPolicy
from clara_jax.pretrained import REFERENCE_SPREAD
from clara_jax.sharding import MeshConfig
from clara_jax.training.objectives import ObjectiveConfig
from clara_jax.training.optimizer import OptimizerConfig
from clara_jax.training.stages import STAGES, StageName


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The frozen base model and the shape of a memory.

    Args:
        base: Base model, a Hugging Face folder, a folder made by `clara_jax.convert base`, or a hub id.
        start_from: Run directory, one of its checkpoints/STEP, or CLaRa checkpoint that training starts from.
        start_fresh: Subtrees to begin anew all the same, for instance generator.
        doc_max_length: Longest document in tokens; what is longer is cut.
        compression_rate: Document tokens per memory token.
        dtype: Compute type; auto is float32 on the CPU and bfloat16 on an accelerator.
        remat: What the backward pass keeps of each layer; everything, dots (products with weights), lora (of those what
            adapters on frozen weights need), offload (the same in the host's memory) or nothing. The rest is computed
            again, for lora without a product with weights.
        attention: Implementation of attention; xla, cudnn (NVIDIA GPU) or splash (TPU).
        memory_token_spread: Spread of new memory tokens' embeddings around the vocabulary's mean, as a share of its own
            spread. By default next to none, as in the reference: all of them begin alike. With 1 they begin apart.

    """

    base: str
    start_from: str | None = None
    start_fresh: list[str] = dataclasses.field(default_factory=list)
    doc_max_length: int = 256
    compression_rate: int = 32
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: RematPolicy = "lora"
    attention: AttentionName = "xla"
    memory_token_spread: float = REFERENCE_SPREAD

    def __post_init__(self) -> None:
        if not 1 <= self.compression_rate <= self.doc_max_length:
            fail(
                f"model.compression_rate is {self.compression_rate} for documents of {self.doc_max_length} tokens",
                "Choose a rate between 1 and model.doc_max_length",
            )
        if not 0 < self.memory_token_spread < float("inf"):
            fail(f"model.memory_token_spread is {self.memory_token_spread}", "Give a positive number")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Validation during training; nothing is evaluated without `path`.

    Args:
        path: Sources of validation records, as in data.path.
        every: Steps between two evaluations; the last step always gets one.
        records: At most so many records, the first ones.
        batch_size: Records per evaluation batch (default: that of training, cut into its micro-batches).
        generate: Records for which answers are generated and scored (em, f1, cover_em); 0 for none.
        max_new_tokens: Longest generated answer in tokens.
        show: Generated answers shown in TensorBoard's Text tab.

    """

    path: list[str] = dataclasses.field(default_factory=list)
    every: int = 500
    records: int = 512
    batch_size: int | None = None
    generate: int = 64
    max_new_tokens: int = 32
    show: int = 4

    def __post_init__(self) -> None:
        for key, least in (("every", 1), ("records", 1), ("generate", 0), ("max_new_tokens", 1), ("show", 0)):
            if getattr(self, key) < least:
                fail(f"evaluation.{key} is {getattr(self, key)}", f"Give at least {least}")
        if self.batch_size is not None and self.batch_size < 1:
            fail(f"evaluation.batch_size is {self.batch_size}", "Give at least 1, or nothing")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Args:
        run_dir: Folder for checkpoints, metrics and TensorBoard.
        stage: What is trained and by which loss.
        model: The frozen base model and the shape of a memory.
        data: Training records.
        evaluation: Validation during training.
        lora: Low-rank adaptation of every linear layer.
        objective: Weights and choices of the losses.
        optimizer: How parameters are updated.
        mesh: How the devices share the work.
        cluster: The processes of a run on several hosts.
        trainable: Subtrees to train instead of the stage's own (compressor, query_reasoner, generator, memory_tokens).
        batch_size: Records per optimizer step, over all devices.
        micro_batches: Parts that each device cuts its share of a batch into, to save memory.
        steps: Optimizer steps (default: as many as `epochs` passes over the data take).
        epochs: Passes over the data where `steps` is not given.
        seed: Seed of new parameters, of the order of records and of dropout.
        resume: What becomes of a run directory that holds a checkpoint; go on from it, or refuse to start.
        log_every: Steps between two lines of metrics.
        checkpoint_every: Steps between two checkpoints; an evaluation and the last step always get one.
        keep_checkpoints: Number of latest checkpoints to keep.
        keep_best: Evaluation metric whose best checkpoint is kept too, for instance evaluation/loss.
        profile: First and last step of a profiler trace, written to run_dir/profile.
        compilation_cache: Folder of compiled programs, which later runs take from there; empty for none.

    """

    run_dir: str
    stage: StageName
    model: ModelConfig
    data: DataConfig
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    cluster: ClusterConfig = dataclasses.field(default_factory=ClusterConfig)
    trainable: list[str] | None = None
    batch_size: int = 128
    micro_batches: int = 1
    steps: int | None = None
    epochs: float = 1.0
    seed: int = 0
    resume: Literal["auto", "never"] = "auto"
    log_every: int = 10
    checkpoint_every: int = 500
    keep_checkpoints: int = 3
    keep_best: str | None = None
    profile: list[int] | None = None
    compilation_cache: str = "~/.cache/clara_jax/compiled"

    def __post_init__(self) -> None:
        if "://" in self.run_dir:
            fail(
                f"run_dir is {self.run_dir}", "Name a local folder; a bucket can be mounted as one (Cloud Storage FUSE)"
            )
        for key in ("batch_size", "micro_batches", "steps", "log_every", "checkpoint_every", "keep_checkpoints"):
            value = getattr(self, key)
            if value is not None and value < 1:
                fail(f"{key} is {value}", "Give at least 1")
        if not 0 < self.epochs < float("inf"):
            fail(f"epochs is {self.epochs}", "Give a positive number")
        if self.profile is not None and not (len(self.profile) == 2 and 0 < self.profile[0] <= self.profile[1]):
            fail(f"profile is {self.profile}", "Give the first and the last step to trace, for instance [10, 12]")
        if self.keep_best is not None and not self.evaluation.path:
            fail(f"keep_best is {self.keep_best}, and evaluation.path is empty", "Name validation records")
        if self.keep_best is not None and not self.keep_best.startswith("evaluation/"):
            fail(f"keep_best is {self.keep_best}", "Name an evaluation metric, for instance evaluation/loss")

    @property
    def trains(self) -> tuple[str, ...]:
        """The subtrees that this run trains."""
        return STAGES[self.stage].trains if self.trainable is None else tuple(self.trainable)


def parse_train_config(arguments: Sequence[str] | None = None) -> TrainConfig:
    """The configuration of `--config FILE` with `--key.subkey VALUE` overrides, checked.

    Raises `UserError` naming the key for anything that does not fit.
    """
    return train_config(parse(_train_parser(), arguments))


def train_config(built: jsonargparse.Namespace) -> TrainConfig:
    """The run that a reader of `train_parser` has read, beside whatever else it read."""
    return TrainConfig(**{field.name: built[field.name] for field in dataclasses.fields(TrainConfig)})


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the resolved configuration as YAML that `--config` reads again. Raises `OSError`."""
    replace_text(path, config_text(config))


def config_text(config: TrainConfig) -> str:
    """The resolved configuration as YAML."""
    parser = _train_parser()
    return str(parser.dump(parser.parse_object(dataclasses.asdict(config))))


def load_config(path: Path) -> TrainConfig:
    """Read a configuration that `save_config` wrote."""
    return parse_train_config(["--config", str(path)])


def train_parser(program: str, description: str) -> jsonargparse.ArgumentParser:
    """A reader of `TrainConfig` from `--config FILE` and overrides, for a command that may add options of its own."""
    parser = jsonargparse.ArgumentParser(prog=program, description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below.")
    parser.add_class_arguments(TrainConfig)
    return parser


def _train_parser() -> jsonargparse.ArgumentParser:
    return train_parser(
        "python -m clara_jax.train",
        "Train one stage of CLaRa. A --config file with the key `curriculum`, a list of stages (files, or the keys "
        "that differ), trains them one after the other.",
    )
