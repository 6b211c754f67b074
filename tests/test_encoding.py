"""Texts to memories in batches: every text once, in its place, and the same numbers however it was batched."""

import dataclasses

import jax
import numpy as np
import pytest

from clara_jax.convert import convert_checkpoint
from clara_jax.data.collate import pad_encoder_inputs
from clara_jax.encoding import LENGTHS, Encoder, fingerprint, text_batches
from clara_jax.pretrained import with_query_reasoner
from clara_jax.sharding import MeshConfig, make_mesh
from clara_jax.training.runs import load_model
from tests.conftest import FIXTURES

MODEL = FIXTURES / "mistral_window" / "ckpt_stage2"


@pytest.fixture(scope="module")
def loaded():
    return load_model(MODEL)


@pytest.fixture(scope="module")
def texts(loaded):
    """Token lists of mixed length, in no order, two of them equal."""
    words = ["the", "river", "stands", "north", "of", "seven", "mills", "and", "Ada", "counts", "them"]
    lines = [" ".join(words[: 1 + (7 * n) % 11]) for n in range(12)]
    return [ids for ids, _ in loaded.tokenizer.encode_passages(lines, loaded.checkpoint.doc_max_length)]


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("budget", [1, 300, 4096])
@pytest.mark.parametrize("number", [1, 7, 400])
def test_batches_hold_every_text_once_and_keep_to_the_budget(number, budget, multiple):
    """If this broke, texts would be lost or computed twice, a batch would not fit the memory or the mesh."""
    longest = 139  # no multiple of 32: that is the length of the longest batches
    sizes = np.random.default_rng(number).integers(9, longest + 1, number)
    batches = list(text_batches(sizes, budget, longest, multiple))
    assert sorted(i for batch in batches for i in batch.texts) == list(range(number))
    for batch in batches:
        assert sizes[batch.texts].max() <= batch.length <= longest
        assert batch.length % LENGTHS == 0 or batch.length == longest
        assert batch.rows % multiple == 0 and batch.rows >= len(batch.texts) > 0
        assert batch.rows * batch.length <= budget or batch.rows == multiple  # less than that there cannot be
    of_order = [sizes[i] for batch in batches for i in batch.texts]
    assert of_order == sorted(of_order, reverse=True)  # the batch that needs the most memory is the first
    assert len({(batch.rows, batch.length) for batch in batches[:-1]}) <= -(-longest // LENGTHS)  # programs to compile


def test_a_text_beyond_the_limit_has_a_batch_that_holds_it():
    """Texts are cut before, but a caller's longer one must not be cut or refused here."""
    batches = list(text_batches(np.array([10, 200]), 256, longest=139))
    assert batches[0].length == 200 and batches[0].texts.tolist() == [1]


@pytest.mark.parametrize("multiple", [1, 4])
def test_padding_is_bounded(multiple):
    """If this broke, most of the time would go into padding.

    A row is padded by less than `LENGTHS` beyond the longest text of its batch. Batches are sorted, so what they differ
    by within adds up to at most one batch padded from the shortest text to the longest; the last may lack rows.
    """
    budget, longest = 1024, 267
    sizes = np.random.default_rng(0).integers(20, longest + 1, 1000)
    batches = list(text_batches(sizes, budget, longest, multiple))
    columns = sum(batch.rows * batch.length for batch in batches)
    most = max(batch.rows for batch in batches)
    bound = (LENGTHS - 1) * len(sizes) + most * (longest - sizes.min()) + batches[-1].rows * batches[-1].length
    assert columns - sizes.sum() <= bound
    assert columns / sizes.sum() < 1.2  # the bound in figures: 16 columns of 144 on average, and little else


def encode_one_by_one(loaded, role, texts, params):
    """Memories of each text read alone and without padding."""
    special = loaded.tokenizer.special
    read = jax.jit(lambda inputs: loaded.model.encode(params, role, inputs)[0])
    rows = [pad_encoder_inputs([text], special, len(text) + special.num_memory) for text in texts]
    return np.concatenate([np.asarray(read(row)) for row in rows])


@pytest.mark.parametrize("role", ["compressor", "query_reasoner"])
def test_batched_memories_are_those_of_single_texts(loaded, texts, role):
    """If this broke, a memory would depend on the texts it was batched with, or lie in another text's place."""
    params = with_query_reasoner(loaded.params)
    expected = encode_one_by_one(loaded, role, texts, params)
    told = []
    encoded = Encoder(loaded, params, batch_tokens=150)(role, texts, told.append)
    # float32 sums in another order; memories are of order one, and two texts differ by more than a hundred times this
    np.testing.assert_allclose(encoded.memories, expected, atol=1e-5, rtol=1e-5)
    assert sum(told) == len(texts) and len(told) > 1
    real = sum(len(text) + loaded.tokenizer.special.num_memory for text in texts)
    assert encoded.columns - encoded.padding == real
    lone = Encoder(loaded, params, batch_tokens=150)(role, texts[:1])
    np.testing.assert_allclose(lone.memories, expected[:1], atol=1e-5, rtol=1e-5)


def test_a_mesh_makes_the_same_memories(texts):
    """If this broke, a store made on several devices would answer queries encoded on one of them badly."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    spread = load_model(MODEL, mesh=mesh)
    alone = load_model(MODEL)
    encoded = Encoder(spread, spread.params, mesh, batch_tokens=300)("compressor", texts)
    expected = encode_one_by_one(alone, "compressor", texts, alone.params)
    np.testing.assert_allclose(encoded.memories, expected, atol=1e-5, rtol=1e-5)


def test_no_texts_make_no_memories(loaded):
    """A segment without passages must not be an error."""
    encoded = Encoder(loaded, loaded.params)("compressor", [])
    assert encoded.memories.shape[0] == encoded.columns == encoded.padding == 0


def test_fingerprint_is_that_of_the_compressor_alone(loaded):
    """If this broke, a store would be refused while its memories are good, or taken when they are stale."""
    before = fingerprint(loaded)

    def with_changed(part):
        changed = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].add(1.0), loaded.params[part])
        return fingerprint(dataclasses.replace(loaded, params={**loaded.params, part: changed}))

    assert with_changed("generator") == with_changed("query_reasoner") == before
    assert with_changed("compressor") != before != with_changed("memory_tokens")


def test_fingerprint_depends_on_neither_the_compute_type_nor_the_form_of_the_checkpoint(loaded, tmp_path):
    """If this broke, a store made in bfloat16 could not be read in float32, nor one of a run by its exported model."""
    assert fingerprint(load_model(MODEL, dtype="bfloat16")) == fingerprint(loaded)
    convert_checkpoint(str(MODEL), tmp_path / "again")
    base = str(FIXTURES / "mistral_window" / "base")
    assert fingerprint(load_model(tmp_path / "again", base=base)) == fingerprint(loaded)
