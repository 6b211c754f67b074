"""Fixed-shape batches from token lists.

Two layouts give the same numbers. The reference pads on the left; this project pads on the right, so that a
row's columns are its positions. A real token attends to real tokens of its row at or before it, wherever the
padding is; rotary attention depends on the distance of two tokens alone, and positions count real tokens only.
Nothing else in the model knows a column's index, so the layouts differ by rounding at most. (Past a model's
original length, longrope and dynamic scaling look at the number of tokens, which here never counts padding.)
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jax import tree_util
from jaxtyping import Bool, Float, Int

from clara_jax.data.length_classes import Shape
from clara_jax.data.samples import Exchange, Sample
from clara_jax.data.tokenizer import SpecialTokens
from clara_jax.errors import fail
from clara_jax.models.roles import AnyArray, EncoderInputs, GeneratorInputs

Side = Literal["left", "right"]


@tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One micro-batch; every leaf leads with the sample axis.

    `documents.tokens` is [batch, candidates, length]; where the documents' memories are known already, these are in
    `memories`, and `documents` is None. `candidates` marks the documents that exist, `positives` those known to be
    relevant (retrieval only). `questions` is read by the query reasoner.
    `rows` is each sample's place in the whole batch of the step, from which its dropout is drawn, so that it
    does not depend on how a batch is cut; without it the batch is taken as whole.
    """

    documents: EncoderInputs | None
    candidates: Bool[AnyArray, "batch candidates"]
    prompts: GeneratorInputs | None = None
    questions: EncoderInputs | None = None
    positives: Bool[AnyArray, "batch candidates"] | None = None
    rows: Int[AnyArray, " batch"] | None = None
    memories: Float[AnyArray, "batch candidates memory hidden"] | None = None


def collate(
    samples: Sequence[Sample],
    special: SpecialTokens,
    shape: Shape,
    rows: Sequence[int],
    memories: Sequence[Float[np.ndarray, "_ memory hidden"]] | None = None,
) -> Batch:
    """The samples padded to `shape`; `rows` are their places in the whole batch of the step.

    A sample without documents and with one token of prompt is a masked row. `memories`, if given, are those of each
    sample's documents, and stand in the batch for the documents.
    """
    documents, stored = None, None
    if memories is None:
        documents, exists = pad_candidates(
            [s.documents for s in samples], special, shape.document, at_least=shape.candidates
        )
    else:
        stored, exists = pad_memories(memories, shape.candidates)
    prompts = pad_exchanges(
        [s.exchange for s in samples],
        [s.slots for s in samples],
        special,
        shape.prompt,
        shape.targets,
        at_least=shape.slots,
    )
    questions = positives = None
    if shape.question:
        questions = pad_encoder_inputs([s.question or [] for s in samples], special, shape.question)
        positives = np.array([[i in (s.positives or ()) for i in range(shape.candidates)] for s in samples], bool)
    return Batch(documents, exists, prompts, questions, positives, np.array(rows, np.int32), stored)


def pad_memories(
    memories: Sequence[Float[np.ndarray, "_ memory hidden"]], candidates: int
) -> tuple[Float[np.ndarray, "batch candidates memory hidden"], Bool[np.ndarray, "batch candidates"]]:
    """Each sample's memories, filled up with zeros to `candidates`, and which of them exist."""
    padded = np.zeros((len(memories), candidates, *memories[0].shape[1:]), memories[0].dtype)
    exists = np.zeros((len(memories), candidates), bool)
    for row, of_sample in enumerate(memories):
        padded[row, : len(of_sample)] = of_sample
        exists[row, : len(of_sample)] = True
    return padded, exists


def pad_encoder_inputs(
    passages: Sequence[list[int]], special: SpecialTokens, length: int, side: Side = "right"
) -> EncoderInputs:
    """Rows of passage tokens followed by the memory tokens, padded to `length` columns (memory included)."""
    tokens = np.full((len(passages), length), special.pad, np.int32)
    valid = np.zeros((len(passages), length), bool)
    columns = np.zeros((len(passages), special.num_memory), np.int32)
    for row, passage in enumerate(passages):
        ids = passage + special.memory_ids
        start = length - len(ids) if side == "left" else 0
        if start < 0 or len(ids) > length:
            raise ValueError(f"a passage of {len(ids)} tokens does not fit {length} columns")
        tokens[row, start : start + len(ids)] = ids
        valid[row, start : start + len(ids)] = True
        columns[row] = start + len(passage) + np.arange(special.num_memory)
    return EncoderInputs(tokens, valid, columns)


def pad_candidates(
    documents: Sequence[Sequence[list[int]]],
    special: SpecialTokens,
    length: int,
    side: Side = "right",
    at_least: int = 0,
) -> tuple[EncoderInputs, np.ndarray]:
    """Each sample's documents as [batch, candidates, length], and which of them exist.

    There are as many candidates as the largest sample has, and `at_least` so many.
    """
    most = max(at_least, *(len(row) for row in documents))
    exists = np.array([[i < len(row) for i in range(most)] for row in documents])
    filled = [list(row) + [[]] * (most - len(row)) for row in documents]
    flat = pad_encoder_inputs([passage for row in filled for passage in row], special, length, side)
    shaped = tree_util.tree_map(lambda x: x.reshape(len(documents), most, -1), flat)
    return shaped, exists


def pad_exchanges(
    exchanges: Sequence[Exchange],
    documents: Sequence[int],
    special: SpecialTokens,
    length: int,
    targets: int,
    side: Side = "right",
    at_least: int = 0,
) -> GeneratorInputs:
    """Rows of prompt and answer, padded to `length` columns and `targets` answer tokens.

    `documents[row]` memories stand in the prompt, one after the other, each followed by `<SEP>`. There are
    slots for as many as the largest prompt has, and `at_least` so many.
    """
    batch, most = len(exchanges), max(at_least, *documents)
    tokens = np.full((batch, length), special.pad, np.int32)
    valid = np.zeros((batch, length), bool)
    slots = np.full((batch, most, special.num_memory), length, np.int32)
    target_columns = np.zeros((batch, targets), np.int32)
    target_tokens = np.zeros((batch, targets), np.int32)
    weights = np.zeros((batch, targets), np.float32)
    for row, exchange in enumerate(exchanges):
        size = len(exchange.tokens)
        start = length - size if side == "left" else 0
        tokens[row, start : start + size] = exchange.tokens
        valid[row, start : start + size] = True
        slots[row, : documents[row]] = start + memory_columns(exchange.tokens, documents[row], special)
        answer = np.arange(exchange.prompt_length, size)
        target_columns[row, : len(answer)] = start + answer - 1
        target_tokens[row, : len(answer)] = exchange.tokens[exchange.prompt_length :]
        weights[row, : len(answer)] = 1.0
    return GeneratorInputs(tokens, valid, slots, target_columns, target_tokens, weights)


def memory_columns(tokens: list[int], documents: int, special: SpecialTokens) -> Int[np.ndarray, "documents memory"]:
    """Columns of the memories in a prompt: from the first `<MEM0>` on, with a `<SEP>` after each.

    Raises `UserError` if the prompt was cut so short that they are not all there.
    """
    if documents == 0:
        return np.zeros((0, special.num_memory), np.int64)
    stride = special.num_memory + 1
    first = tokens.index(special.first_memory) if special.first_memory in tokens else len(tokens)
    if first + documents * stride > len(tokens):
        fail(
            f"a prompt of {len(tokens)} tokens has no room for {documents} memories of {special.num_memory} tokens",
            "Raise the generator's length limit or take fewer documents",
        )
    return first + np.arange(documents)[:, None] * stride + np.arange(special.num_memory)[None, :]


def round_up(length: int, limit: int) -> int:
    """A length to pad `length` tokens to, at most `limit`, where no data is known to choose shapes from.

    Lengths are 32, 48, 64, 96, 128, 192, ...: padding is below a third of a row, and few are compiled.
    """
    padded = 32
    while padded < length:
        padded = padded * 3 // 2 if padded & (padded - 1) == 0 else padded * 4 // 3
    return max(min(padded, limit), length)
