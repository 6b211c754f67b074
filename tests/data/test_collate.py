"""Fixed-shape batches: every token, slot and target in its place, and padding that changes no loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clara_jax.data.collate import Batch, collate, pad_candidates, pad_encoder_inputs, pad_exchanges, round_up
from clara_jax.data.length_classes import Shape
from clara_jax.data.samples import Exchange, Sample
from clara_jax.data.tokenizer import SpecialTokens
from clara_jax.errors import UserError
from clara_jax.models.config import DecoderConfig, Rope
from clara_jax.models.decoder import Decoder
from clara_jax.models.lora import adapter_shapes
from clara_jax.models.roles import ROLES, EncoderInputs, GeneratorInputs, RoleModel
from clara_jax.training.objectives import (
    ObjectiveConfig,
    compression_objective,
    end_to_end_objective,
    retrieval_objective,
)

# <MEM0> <MEM1> <AE> <ENC> <SEP> are 20..24 in a vocabulary of 25.
SPECIAL = SpecialTokens(first_memory=20, num_memory=2, ae=22, enc=23, sep=24, bos=1, eos=2, pad=0)
MEMORY = [20, 21, 24]


@pytest.mark.parametrize(("side", "start"), [("left", 3), ("right", 0)])
def test_encoder_inputs(side, start):
    """A memory read one column off is another state of the model."""
    inputs = pad_encoder_inputs([[23, 1, 5], [23, 1, 5, 6, 7, 2]], SPECIAL, 8, side)
    expected = np.zeros(8, int)
    expected[start : start + 5] = [23, 1, 5, 20, 21]
    np.testing.assert_array_equal(inputs.tokens, [expected, [23, 1, 5, 6, 7, 2, 20, 21]])
    np.testing.assert_array_equal(inputs.valid.sum(axis=1), [5, 8])
    assert inputs.valid[0, start : start + 5].all()
    np.testing.assert_array_equal(inputs.memory_columns, [[start + 3, start + 4], [6, 7]])
    with pytest.raises(ValueError, match="9 tokens does not fit 8 columns"):
        pad_encoder_inputs([[1] * 7], SPECIAL, 8, side)


def test_candidates_of_different_counts():
    """A padding document would be retrieved, or a real one masked."""
    documents, exists = pad_candidates([[[5]], [[6, 6], [7], [8, 8, 8]], []], SPECIAL, 6)
    assert documents.tokens.shape == (3, 3, 6)
    assert documents.memory_columns.shape == (3, 3, 2)
    np.testing.assert_array_equal(exists, [[True, False, False], [True] * 3, [False] * 3])
    expected = [[6, 6, 20, 21, 0, 0], [7, 20, 21, 0, 0, 0], [8, 8, 8, 20, 21, 0]]
    np.testing.assert_array_equal(documents.tokens[1], expected)
    np.testing.assert_array_equal(documents.valid, documents.tokens != 0)
    np.testing.assert_array_equal(documents.memory_columns[1, :, 0], [2, 1, 3])


@pytest.mark.parametrize(("side", "starts"), [("left", (0, 6)), ("right", (0, 0))])
def test_slots_and_targets(side, starts):
    """Memories would stand beside their places, or the loss be taken at the wrong tokens."""
    long = Exchange([1, 9, *MEMORY, *MEMORY, 10, 11, 12, 2], 9)  # 9 prompt tokens, 3 targets
    short = Exchange([1, *MEMORY, 13, 2], 5)  # 5 prompt tokens, 1 target
    inputs = pad_exchanges([long, short], [2, 1], SPECIAL, 12, 4, side)
    for row, (exchange, start) in enumerate(zip((long, short), starts, strict=True)):
        size = len(exchange.tokens)
        assert inputs.tokens[row, start : start + size].tolist() == exchange.tokens
        assert np.flatnonzero(inputs.valid[row]).tolist() == list(range(start, start + size))
        answer = exchange.tokens[exchange.prompt_length :]
        assert inputs.target_tokens[row, : len(answer)].tolist() == answer
        np.testing.assert_array_equal(inputs.target_weights[row], [1.0] * len(answer) + [0.0] * (4 - len(answer)))
        for place, token in enumerate(answer):  # the column before a target predicts it
            assert inputs.tokens[row, inputs.target_columns[row, place] + 1] == token
    np.testing.assert_array_equal(inputs.slots[0], [[2, 3], [5, 6]])
    # The second row has one document: the other slot is past the end, where nothing is written.
    np.testing.assert_array_equal(inputs.slots[1], [[starts[1] + 1, starts[1] + 2], [12, 12]])


def test_a_memory_token_in_the_question_is_not_a_slot():
    """Slots are counted from the first <MEM0>: one written by a user later in the prompt must not move them."""
    inputs = pad_exchanges([Exchange([1, *MEMORY, 20, 21, 9, 2], 7)], [1], SPECIAL, 8, 1)
    np.testing.assert_array_equal(inputs.slots, [[[1, 2]]])


def test_truncated_targets():
    """A prompt as long as the limit has no target left: its weights are zero, not NaN."""
    inputs = pad_exchanges([Exchange([1, *MEMORY], 4)], [1], SPECIAL, 8, 2)
    np.testing.assert_array_equal(inputs.target_weights, [[0.0, 0.0]])


@pytest.mark.parametrize("tokens", [[1, 2], [1, 20, 21], [1, *MEMORY, 20, 21], [20, 21, 24, 1]])
def test_a_prompt_too_short_for_its_memories(tokens):
    """The reference falls back to column 0 without a word: memories would overwrite the instructions."""
    with pytest.raises(UserError, match=rf"{len(tokens)} tokens has no room for 2 memories of 2 tokens.*length limit"):
        pad_exchanges([Exchange(tokens, len(tokens))], [2], SPECIAL, 8, 1)


def test_rows_without_documents_need_no_slot():
    """A sample that pads the batch has no memory token to find."""
    inputs = pad_exchanges([Exchange([0], 1), Exchange([1, *MEMORY, 2], 4)], [0, 1], SPECIAL, 8, 1)
    np.testing.assert_array_equal(inputs.slots, [[[8, 8]], [[1, 2]]])


def test_collate_pads_to_the_shape():
    """A batch of another shape than was compiled would be compiled again, in the middle of a run."""
    exchange = Exchange([1, *MEMORY, 9, 2], 4)
    samples = [
        Sample([[5] * 40, [6]], exchange, 1, question=[7] * 3, positives=(1,)),
        Sample([[5]], exchange, 1, question=[7], positives=None),
    ]
    batch = collate(samples, SPECIAL, Shape(3, 48, 32, 8, 16, 2), [4, 6])
    assert batch.documents.tokens.shape == (2, 3, 48)
    assert batch.questions.tokens.shape == (2, 16)
    assert batch.prompts.tokens.shape == (2, 32)
    assert batch.prompts.slots.shape == (2, 2, 2)
    assert batch.prompts.target_tokens.shape == (2, 8)
    np.testing.assert_array_equal(batch.candidates, [[True, True, False], [True, False, False]])
    np.testing.assert_array_equal(batch.positives, [[False, True, False], [False] * 3])
    np.testing.assert_array_equal(batch.rows, [4, 6])
    # A masked row, and samples without a question.
    empty = Sample([], Exchange([0], 1), 0)
    batch = collate([Sample([[5] * 43], exchange, 1), empty], SPECIAL, Shape(1, 45, 6, 2, 0, 1), [0, 1])
    np.testing.assert_array_equal(batch.candidates, [[True], [False]])
    np.testing.assert_array_equal(batch.prompts.target_weights, [[1.0, 1.0], [0.0, 0.0]])
    assert batch.questions is None
    assert batch.positives is None


def test_round_up():
    """A length below its text crashes; far too many lengths compile all day."""
    buckets = {round_up(length, 10**6) for length in range(1, 5000)}
    assert len(buckets) <= 16
    for length in range(1, 5000):
        bucket = round_up(length, 10**6)
        assert length <= bucket <= max(32, length * 3 / 2)
        assert round_up(length, 100) == max(length, min(bucket, 100))


# What padding does to the losses: a tiny model with random weights.


@functools.cache
def tiny_model():
    config = DecoderConfig("llama", 25, 8, 12, 1, 2, 1, 4, Rope(100.0, 4))
    decoder = Decoder(config, jnp.float64)
    model, rng = RoleModel(decoder, SPECIAL.first_memory), np.random.default_rng(0)

    def fill(leaf):
        return rng.normal(size=leaf.shape) * 0.5

    params = {"base": jax.tree.map(fill, decoder.abstract_base()), "memory_tokens": fill(np.zeros((2, 8)))}
    for role in ROLES:
        params[role] = jax.tree.map(fill, adapter_shapes(config, 2))
    return model, params


def tight_batch(counts: tuple[int, int]) -> Batch:
    """Two samples with so many documents each, no more padding than their difference asks for; two slots each."""
    rng = np.random.default_rng(1)

    def text(size):
        return rng.integers(3, 20, size).tolist()

    rows = [[text(3), text(6), text(5)][: counts[0]], [text(4), text(2)][: counts[1]]]
    documents, exists = pad_candidates(rows, SPECIAL, 8)
    exchanges = [Exchange([1, 5, *MEMORY, *MEMORY, *text(4), 2], 9), Exchange([1, *MEMORY, *MEMORY, 8, *text(2), 2], 8)]
    prompts = pad_exchanges(exchanges, [2, 2], SPECIAL, 13, 4)
    questions = pad_encoder_inputs([text(3), text(4)], SPECIAL, 6)
    positives = np.array([[False, True, False], [True, False, False]])[:, : max(counts)]
    return Batch(documents, exists, prompts, questions, positives)


def grown(batch: Batch, slots: int) -> Batch:
    """The same samples with more of everything that is padding: rows, candidates, lengths, targets, slots."""

    def pad(array, *widths, fill=0):
        return np.pad(array, [(0, width) for width in widths], constant_values=fill)

    def passages(inputs, *lead):
        tokens, valid = pad(inputs.tokens, *lead, 5, fill=9), pad(inputs.valid, *lead, 5)
        return EncoderInputs(tokens, valid, pad(inputs.memory_columns, *lead, 0))

    prompts, longer = batch.prompts, batch.prompts.tokens.shape[1] + 4
    return Batch(
        passages(batch.documents, 2, 2),
        pad(batch.candidates, 2, 2),
        GeneratorInputs(
            tokens=pad(prompts.tokens, 2, 4, fill=9),
            valid=pad(prompts.valid, 2, 4),
            slots=pad(prompts.slots, 2, slots, 0, fill=longer),
            target_columns=pad(prompts.target_columns, 2, 3),
            target_tokens=pad(prompts.target_tokens, 2, 3),
            target_weights=pad(prompts.target_weights, 2, 3),
        ),
        passages(batch.questions, 2),
        pad(batch.positives, 2, 2),
    )


OBJECTIVES = {
    "compression": (compression_objective, ("compressor", "generator", "memory_tokens")),
    "end_to_end": (end_to_end_objective, ("compressor", "query_reasoner", "memory_tokens")),
    "retrieval": (retrieval_objective, ("query_reasoner",)),
}


def call(function, batch: Batch, trains: tuple[str, ...]):
    """`function` of the tiny model, compiled without the optimiser: compiling costs seconds here, running nothing."""
    params = tiny_model()[1]
    trainable = {name: params[name] for name in trains}
    frozen = {name: tree for name, tree in params.items() if name not in trains}
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})(trainable, frozen, batch, None)


@pytest.mark.parametrize(("make", "trains"), OBJECTIVES.values(), ids=OBJECTIVES)
def test_padding_does_not_change_the_loss(make, trains):
    """The loss would depend on what else is in the batch, on the bucket and on the number of devices."""
    # In compression every document has a slot of its own; in retrieval the best two fill the slots.
    everything = make is compression_objective
    with jax.enable_x64(True):
        objective = make(tiny_model()[0], ObjectiveConfig(top_k=2, temperature=0.1))
        tight = tight_batch((2, 2) if everything else (3, 2))
        loss, metrics = call(objective, tight, trains)
        padded_loss, padded = call(objective, grown(tight, slots=2 if everything else 0), trains)
        assert float(loss) > 0.01
        # Float64, so that no rounding can hide a term that should not be there.
        assert float(padded_loss) == pytest.approx(float(loss), rel=1e-9)
        if "selected" in metrics:
            np.testing.assert_array_equal(padded["selected"][:2], metrics["selected"])
            np.testing.assert_allclose(padded["scores"][:2, :2], metrics["scores"][:, :2], rtol=1e-9)
            assert (np.asarray(padded["scores"][:, 3:]) == -np.inf).all()


@pytest.mark.parametrize("name", ["end_to_end", "retrieval"])
def test_padding_puts_no_nan_into_the_gradient(name):
    """Rows without documents have scores of -inf only: a softmax of those would turn the adapters into NaN."""
    make, trains = OBJECTIVES[name]
    with jax.enable_x64(True):
        objective = make(tiny_model()[0], ObjectiveConfig(top_k=2, temperature=0.1))
        gradient, _ = call(jax.grad(objective, has_aux=True), grown(tight_batch((3, 2)), slots=0), trains)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
            assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
            assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)
