"""Batches of a few fixed shapes, prepared ahead by grain.

The order is a function of the seed and of a batch's number alone, so that a run can go on from any step; which
samples a batch has, its shape and its counts are known without reading a token, so that every process can read
its own rows of it and needs to ask no other.
"""

import dataclasses
import functools
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import grain
import numpy as np
from absl import flags
from jaxtyping import Float, Int

from clara_jax.data.collate import Batch, collate
from clara_jax.data.length_classes import LengthClasses, Shape, choose_classes
from clara_jax.data.order import FileOrder, TrainingOrder
from clara_jax.data.records import BadRecordPolicy
from clara_jax.data.samples import Exchange, Limits, Sample, SampleKind
from clara_jax.data.token_cache import Recipe, default_cache_dir, tokenize
from clara_jax.data.tokenized import LENGTHS, TokenizedDataset
from clara_jax.data.tokenizer import LAYOUT_TOKENS, ClaraTokenizer, SpecialTokens
from clara_jax.errors import fail


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Training records.

    Args:
        path: Sources: .jsonl or .parquet files, folders of Hugging Face datasets, hub ids (owner/name:split).
        weights: Each source's share of the samples (default: every sample once an epoch).
        on_bad_record: Stop at a malformed record, or skip and count it.
        question_max_length: Longest question in tokens for the query reasoner.
        prompt_max_length: Longest prompt with answer in tokens for the generator.
        length_classes: Batch shapes to choose from the data; more have less padding, each is compiled once.
        memories: Whence training on retrieval takes the candidates' memories; store, where they are put once before
            the first step, or step, which compresses them anew in every step (the only way to train the compressor).
        stores: Memory stores to look candidates up in first, made by clara_jax.compress with the same compressor.
        workers: Processes that prepare batches; 0 prepares them in threads of this one.
        cache_dir: Where tokenised sources are kept, and beside it, in memories, those of candidates (default:
            clara_jax/tokens in the user's cache folder).

    """

    path: list[str]
    weights: list[float] | None = None
    on_bad_record: BadRecordPolicy = "stop"
    question_max_length: int = 256
    prompt_max_length: int = 1024
    length_classes: int = 4
    memories: Literal["store", "step"] = "store"
    stores: list[str] = dataclasses.field(default_factory=list)
    workers: int = 0
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if not self.path:
            fail("data.path is empty", "Name at least one source of records")
        for key in ("question_max_length", "prompt_max_length", "length_classes"):
            if getattr(self, key) < 1:
                fail(f"data.{key} is {getattr(self, key)}", "Give at least 1")
        if self.stores and self.memories == "step":
            fail("data.stores is given, and data.memories is step", "Set data.memories to store, or give no stores")
        if self.workers < 0:
            fail(f"data.workers is {self.workers}", "Give 0 or a number of processes")
        if self.weights is None:
            return
        if len(self.weights) != len(self.path):
            fail(
                f"data.weights has {len(self.weights)} numbers and data.path {len(self.path)} sources",
                "Give one weight for each source",
            )
        for weight in self.weights:
            if not (weight > 0 and math.isfinite(weight)):
                fail(f"data.weights holds {weight}", "Give positive numbers, and leave out sources that are not wanted")


@dataclasses.dataclass(frozen=True)
class Data:
    """All tokenised sources of a run. A sample's number counts on from source to source."""

    datasets: tuple[TokenizedDataset, ...]
    weights: tuple[float, ...] | None
    recipe: Recipe
    special: SpecialTokens

    def __len__(self) -> int:
        return sum(map(len, self.datasets))

    @property
    def fingerprint(self) -> str:
        """Changes with any sample and with the weights; where and in what form the sources are has no part in it."""
        text = json.dumps([[dataset.checksum for dataset in self.datasets], self.weights])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def sample(self, number: int) -> Sample:
        """Sample `number`. Raises `IndexError`."""
        for dataset in self.datasets:
            if number < len(dataset):
                return dataset.sample(number)
            number -= len(dataset)
        raise IndexError(f"sample {number + len(self)} of {len(self)}")

    @functools.cached_property
    def lengths(self) -> Int[np.ndarray, "samples 5"]:
        """Each sample's `tokenized.LENGTHS`."""
        return np.concatenate([dataset.lengths for dataset in self.datasets])

    @functools.cached_property
    def totals(self) -> Int[np.ndarray, "samples 4"]:
        """Each sample's `tokenized.TOTALS`."""
        return np.concatenate([dataset.totals for dataset in self.datasets])


def cache_folder(config: DataConfig) -> Path:
    """Where tokenised sources are kept."""
    return default_cache_dir() if config.cache_dir is None else Path(config.cache_dir).expanduser()


def load(
    config: DataConfig,
    tokenizer: ClaraTokenizer,
    kind: SampleKind,
    doc_max_length: int,
    top_k: int,
    seed: int,
    report: Callable[[str], None] = print,
) -> Data:
    """Tokenise all sources, or take them from the cache, and `report` a line on each.

    Raises `UserError` for a source that cannot be used.
    """
    limits = Limits(doc_max_length, config.question_max_length, config.prompt_max_length)
    recipe = Recipe(kind, limits, top_k, seed, config.on_bad_record)
    cache_dir = cache_folder(config)
    datasets = []
    for name in config.path:
        dataset = tokenize(name, tokenizer, recipe, cache_dir, report)
        skipped = f"{dataset.skipped} skipped" + (f" (first: {dataset.reason})" if dataset.reason else "")
        cut = int(dataset.totals[:, 3].sum())
        report(f"{name}: {len(dataset)} samples, {skipped}, {cut} texts longer than their limit")
        datasets.append(dataset)
    weights = None if config.weights is None else tuple(config.weights)
    return Data(tuple(datasets), weights, recipe, tokenizer.special)


@dataclasses.dataclass(frozen=True)
class Counted:
    """A batch, or some rows of it, with what the host counted in the whole of it.

    Tokens are real ones that the step reads, `padding` is the share of all columns that is padding, `cut` the number
    of texts that were longer than their limit. `samples` are the numbers of the whole batch's samples in order, -1 for
    a masked row.
    """

    batch: Batch
    document_tokens: int
    target_tokens: int
    padding: float
    cut: int
    shape: Shape
    samples: Int[np.ndarray, " batch"]


@runtime_checkable
class StoredMemories(Protocol):
    """Memories of the documents of each sample, known before training (`clara_jax.training.candidates`)."""

    def of_samples(self, numbers: Int[np.ndarray, " samples"]) -> list[Float[np.ndarray, "_ memory hidden"]]:
        """Those of the samples of these numbers; -1 is a masked row, which has none."""


@dataclasses.dataclass(frozen=True)
class Batches:
    """Batches by number, in an order and of the shapes of some classes; of each batch only `rows` are read.

    With `memories` a batch has the memories of its documents in place of their tokens.
    """

    data: Data
    order: TrainingOrder | FileOrder
    classes: LengthClasses
    rows: tuple[int, ...]
    workers: int = 0
    memories: StoredMemories | None = None

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes that batches come in, smallest first: those that will be compiled."""
        return self.classes.shapes

    @functools.cached_property
    def expected_padding(self) -> float:
        """Share of all columns that is padding, over the first window of batches (or all, in file order)."""
        order = self.order
        number = order.window_batches if isinstance(order, TrainingOrder) else len(order)
        counts = [self._count(order.batch(i)) for i in range(number)]
        return 1.0 - sum(real for _, real in counts) / sum(columns for columns, _ in counts)

    def iterate(self, start: int = 0) -> Iterator[Counted]:
        """The batches from number `start` on, prepared ahead."""
        end = sys.maxsize if isinstance(self.order, TrainingOrder) else len(self.order)
        made = grain.MapDataset.range(start, end).map(self.__getitem__)
        if self.workers == 0:
            return iter(made.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain's worker processes ask for absl flags, which only absl programs parse
        options = grain.MultiprocessingOptions(num_workers=self.workers, per_worker_buffer_size=2)
        return iter(made.to_iter_dataset(grain.ReadOptions(num_threads=1)).mp_prefetch(options))

    def __getitem__(self, number: int) -> Counted:
        """Batch `number`."""
        samples = self.order.batch(number)
        real = samples[samples >= 0]
        shape = self._shape(samples)
        columns, tokens = self._count(samples)
        document_tokens, target_tokens, _, cut = self.data.totals[real].sum(axis=0, dtype=np.int64).tolist()
        wanted = samples[list(self.rows)]
        mine = [self.data.sample(int(i)) if i >= 0 else self._masked for i in wanted]
        memories = None if self.memories is None else self.memories.of_samples(wanted)
        return Counted(
            batch=collate(mine, self.data.special, shape, self.rows, memories),
            document_tokens=0 if self.memories is not None else document_tokens,
            target_tokens=target_tokens,
            padding=1.0 - tokens / columns,
            cut=cut,
            shape=shape,
            samples=samples,
        )

    @property
    def _masked(self) -> Sample:
        return Sample(documents=[], exchange=Exchange([self.data.special.pad], 1), slots=0)

    def _shape(self, samples: Int[np.ndarray, " batch"]) -> Shape:
        return self.shapes[int(self.classes.of[samples[samples >= 0]].max())]

    def _count(self, samples: Int[np.ndarray, " batch"]) -> tuple[int, int]:
        """Columns of the batch, and how many of them hold real tokens."""
        of_documents, _, real, _ = self.data.totals[samples[samples >= 0]].sum(axis=0, dtype=np.int64).tolist()
        if self.memories is not None:
            real -= of_documents
        return len(samples) * self._shape(samples).columns, real


def training_batches(
    data: Data,
    batch_size: int,
    seed: int,
    length_classes: int = 4,
    workers: int = 0,
    rows: Sequence[int] | None = None,
    memories: StoredMemories | None = None,
) -> Batches:
    """Endless shuffled batches, in shapes chosen from the data. `rows` are those that this process reads (all).

    Raises `UserError` if there are fewer samples than `batch_size`.
    """
    if len(data) < batch_size:
        fail(
            f"data.path holds {len(data)} samples, batch_size is {batch_size}",
            "Give more data or a smaller batch_size",
        )
    if seed < 0:
        fail(f"seed is {seed}", "Give 0 or a positive number")
    classes = _classes(data, data.lengths, length_classes, memories)
    order = TrainingOrder(tuple(map(len, data.datasets)), data.weights, classes.of, batch_size, seed)
    return Batches(data, order, classes, tuple(range(batch_size) if rows is None else rows), workers, memories)


def sequential_batches(
    data: Data,
    batch_size: int,
    workers: int = 0,
    rows: Sequence[int] | None = None,
    limit: int | None = None,
    memories: StoredMemories | None = None,
) -> Batches:
    """The first `limit` samples (all) once each in the order of the sources, in one shape.

    The last batch is filled up with masked rows: no candidates, no positives, no targets. Raises `UserError` for a
    `limit` below 1.
    """
    samples = len(data) if limit is None else min(limit, len(data))
    if samples < 1:
        fail(f"{limit} samples are to be read", "Give at least 1")
    classes = _classes(data, data.lengths[:samples], 1, memories)
    order = FileOrder(samples, batch_size)
    return Batches(data, order, classes, tuple(range(batch_size) if rows is None else rows), workers, memories)


def _classes(
    data: Data, lengths: Int[np.ndarray, "samples 5"], number: int, memories: StoredMemories | None
) -> LengthClasses:
    if memories is not None:  # no document is read
        lengths = lengths * np.array([name != "document" for name in LENGTHS])
    recipe, on_top = data.recipe, LAYOUT_TOKENS + data.special.num_memory
    limits = recipe.limits
    caps = (limits.document + on_top, limits.prompt, limits.prompt, limits.question + on_top)
    return choose_classes(lengths, caps, number, recipe.top_k if recipe.kind == "retrieval" else None)
