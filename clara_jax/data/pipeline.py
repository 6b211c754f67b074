"""The stream of training batches: records, shuffled, tokenised and padded, by grain.

The order is a function of the seed and of a batch's number alone, so that a run can go on from any step.
"""

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import grain
import numpy as np

from clara_jax.data.buckets import round_up
from clara_jax.data.collate import Batch, pad_candidates, pad_encoder_inputs, pad_exchanges
from clara_jax.data.records import Record
from clara_jax.data.samples import Limits, Sample, compression_sample, instruction_sample, retrieval_sample
from clara_jax.data.tokenizer import ClaraTokenizer, SpecialTokens

SampleKind = Literal["compression", "instruction", "retrieval"]


@dataclasses.dataclass(frozen=True)
class Counted:
    """A batch with what the host counted in it.

    `tokens` are real tokens by kind (document, target), `padding` the share of all columns that are padding,
    `cut` the number of texts that were longer than their limit.
    """

    batch: Batch
    document_tokens: int
    target_tokens: int
    padding: float
    cut: int


def batches(
    records: Sequence[Record],
    tokenizer: ClaraTokenizer,
    limits: Limits,
    kind: SampleKind,
    top_k: int,
    batch_size: int,
    seed: int,
) -> grain.MapDataset[Counted]:
    """Endless batches, addressed by step: `batches(...)[step]`. Each epoch has an order of its own."""

    def to_sample(record: Record, rng: np.random.Generator) -> Sample:
        draws = random.Random(int(rng.integers(2**62)))
        return sampler(kind, top_k)(record, tokenizer, limits, draws)

    def to_batch(samples: Sequence[Sample]) -> Counted:
        # The top-k needs k candidates and fills k slots, in batches of small candidate sets too.
        return collate(samples, tokenizer.special, limits, top_k if kind == "retrieval" else 0)

    dataset = grain.MapDataset.source(records).seed(seed).shuffle().repeat()
    return dataset.random_map(to_sample).batch(batch_size, batch_fn=to_batch)


def iterate(dataset: grain.MapDataset[Counted], start: int, threads: int = 2) -> Iterator[Counted]:
    """The batches from number `start` on, prepared ahead by `threads`."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4)
    return iter(dataset[start:].to_iter_dataset(options))


def sampler(kind: SampleKind, top_k: int) -> Callable[[Record, ClaraTokenizer, Limits, random.Random], Sample]:
    """How a record becomes a sample."""
    if kind == "compression":
        return compression_sample
    if kind == "instruction":
        return instruction_sample
    return lambda record, tokenizer, limits, rng: retrieval_sample(record, tokenizer, limits, top_k)


def collate(samples: Sequence[Sample], special: SpecialTokens, limits: Limits, at_least: int = 0) -> Counted:
    """Pad samples to the smallest buckets that hold them, with `at_least` so many candidates and slots."""
    layout = 3 + special.num_memory
    longest = max(len(ids) for s in samples for ids in s.documents) + special.num_memory
    document_length = round_up(longest, limits.document + layout)
    documents, exists = pad_candidates([s.documents for s in samples], special, document_length, at_least=at_least)
    prompts = pad_exchanges(
        [s.exchange for s in samples],
        [s.slots for s in samples],
        special,
        round_up(max(len(s.exchange.tokens) for s in samples), limits.prompt),
        round_up(max(len(s.exchange.tokens) - s.exchange.prompt_length for s in samples), limits.prompt),
        at_least=at_least,
    )
    questions = positives = None
    if samples[0].question is not None:
        rows = [s.question or [] for s in samples]
        length = round_up(max(map(len, rows)) + special.num_memory, limits.question + layout)
        questions = pad_encoder_inputs(rows, special, length)
        positives = np.array([[i in (s.positives or ()) for i in range(exists.shape[1])] for s in samples], bool)
    masks = [documents.valid & exists[:, :, None], prompts.valid]
    masks += [] if questions is None else [questions.valid]
    return Counted(
        Batch(documents, exists, prompts, questions, positives),
        document_tokens=int(masks[0].sum()),
        target_tokens=int(prompts.target_weights.sum()),
        padding=1.0 - sum(int(m.sum()) for m in masks) / sum(m.size for m in masks),
        cut=sum(s.cut for s in samples),
    )
