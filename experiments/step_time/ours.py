"""The real training step of a stage, on the batches that a run of it reads, and on the same records laid out otherwise.

Each other layout takes one thing away from a batch of this project, so that the times say what that thing is worth.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import jax

from clara_jax.config import ModelConfig, TrainConfig
from clara_jax.data import pipeline
from clara_jax.data.collate import Batch, collate
from clara_jax.data.length_classes import Shape
from clara_jax.data.pipeline import Batches, Counted, DataConfig
from clara_jax.data.samples import Sample
from clara_jax.data.tokenizer import LAYOUT_TOKENS
from clara_jax.sharding import MeshConfig, place_batch
from clara_jax.training.candidates import CandidateMemories, store_candidates
from clara_jax.training.objectives import ObjectiveConfig
from clara_jax.training.optimizer import OptimizerConfig, make_optimizer
from clara_jax.training.setup import Run, prepare
from clara_jax.training.stages import STAGES, StageName
from clara_jax.training.step import Step, make_step
from experiments.compression.models import DOC_MAX_LENGTH
from experiments.step_time.baseline import LEARNING_RATE, MSE_WEIGHT, QUESTION_MAX_LENGTH, TEMPERATURE
from experiments.step_time.models import LORA, TOP_K


@dataclasses.dataclass(frozen=True)
class Layout:
    """What is taken away: padding to the batch's own lengths, logits at targets only, the store of memories."""

    name: str
    padded: bool = False
    all_logits: bool = False
    in_step: bool = False


_OURS = Layout("clara_jax")
_PADDED = Layout("clara_jax, texts padded as the reference does", padded=True)
_ALL_LOGITS = Layout("clara_jax, logits at all prompt columns", all_logits=True)
_IN_STEP = Layout("clara_jax, candidates compressed in the step", in_step=True)
LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "compression_pretraining": (_OURS, _PADDED, _ALL_LOGITS, Layout("clara_jax, both", padded=True, all_logits=True)),
    "end_to_end": (_OURS, _PADDED, _ALL_LOGITS, _IN_STEP, Layout("clara_jax, all three", True, True, True)),
}


@dataclasses.dataclass(frozen=True)
class Store:
    """The memories of the candidates, and what it took to make them."""

    memories: CandidateMemories
    documents: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Stage:
    """A prepared run, whose batches hold documents, and those that it would read from the store, if it has one."""

    run: Run
    batches: Batches
    store: Store | None

    def samples(self, counted: Counted) -> list[Sample]:
        """The records of a batch."""
        return [self.run.batches.data.sample(int(number)) for number in counted.samples]

    def shapes(self, counted: Counted) -> tuple[Shape, Shape]:
        """The batch's shape, and that which a run without a store would give its records."""
        classes = self.run.batches.classes
        return counted.shape, classes.shapes[int(classes.of[counted.samples].max())]

    def lay_out(self, counted: Counted, layout: Layout) -> tuple[Batch, int]:
        """The batch's records in `layout`, on the device, and the columns that a step computes."""
        data = self.run.batches.data
        with_store, without = self.shapes(counted)
        store = None if layout.in_step else self.store
        shape = with_store if store else without
        if layout.padded:
            shape = _padded_as_reference(shape, data.special.num_memory)
        if layout.all_logits:
            shape = dataclasses.replace(shape, targets=shape.prompt)
        memories = store.memories.of_samples(counted.samples) if store else None
        batch = collate(self.samples(counted), data.special, shape, self.batches.rows, memories)
        texts = (batch.documents, batch.prompts, batch.questions)
        columns = sum(text.tokens.size for text in texts if text is not None)
        return place_batch(self.run.mesh, batch, self.run.config.batch_size), columns


class Ours:
    """Training steps, with the state that they leave."""

    def __init__(self, run: Run, step: Step):
        self.step, self.frozen, self.state = step, run.frozen, jax.tree.map(lambda leaf: leaf.copy(), run.state)

    def __call__(self, batch: Batch) -> tuple[float, float]:
        """Take a step; the loss before it, and the gradient's norm."""
        self.state, metrics = self.step(self.state, self.frozen, batch)
        jax.block_until_ready(self.state)
        return float(metrics["loss"]), float(metrics["gradient_norm"])


def make_stage(
    folder: Path,
    model: ModelConfig,
    records: Path,
    stage: StageName,
    batch_size: int,
    report: Callable[[str], None],
) -> Stage:
    """Prepare a run as `clara_jax.train` does, on one device, and fill its store of memories under the clock."""
    config = TrainConfig(
        run_dir=str(folder / "run"),
        stage=stage,
        model=model,
        data=DataConfig(
            [str(records)],
            question_max_length=QUESTION_MAX_LENGTH,
            cache_dir=str(folder / "tokens"),
            memories="step",
        ),
        lora=LORA,
        objective=ObjectiveConfig(MSE_WEIGHT, TOP_K, TEMPERATURE),
        optimizer=OptimizerConfig(LEARNING_RATE, "constant"),
        mesh=MeshConfig(data=1),
        batch_size=batch_size,
    )
    run = prepare(config, report)
    if stage != "end_to_end":
        return Stage(run, run.batches, None)
    data, params = run.batches.data, {**run.frozen, **run.state.trainable}
    started = time.perf_counter()
    memories = store_candidates(config, run.model, params, data, run.mesh, report)
    seconds = time.perf_counter() - started
    batches = pipeline.training_batches(
        data, batch_size, config.seed, config.data.length_classes, rows=run.batches.rows, memories=memories
    )
    documents = len({tuple(document) for i in range(len(data)) for document in data.sample(i).documents})
    return Stage(run, batches, Store(memories, documents, seconds))


def step_without_dropout(run: Run) -> Step:
    """The run's step, but for dropout."""
    model = run.model.model
    decoder = dataclasses.replace(model.decoder, lora_dropout=0.0)
    objective = STAGES[run.config.stage].objective(dataclasses.replace(model, decoder=decoder), run.config.objective)
    return make_step(objective, make_optimizer(run.config.optimizer, run.steps), run.mesh)


def _padded_as_reference(shape: Shape, memory: int) -> Shape:
    """Documents and questions at their limits. Prompts are as long as they were: the reference pads them to the
    longest of the batch.
    """
    document, question = (limit + LAYOUT_TOKENS + memory for limit in (DOC_MAX_LENGTH, QUESTION_MAX_LENGTH))
    return dataclasses.replace(shape, document=document, question=question if shape.question else 0)
