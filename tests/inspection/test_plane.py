"""The plane: its points are the two means of the alignment loss."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clara_jax.data.collate import pad_encoder_inputs
from clara_jax.errors import UserError
from clara_jax.inspection.plane import Means, mean_states, project
from clara_jax.training.runs import load_model
from tests.conftest import FIXTURES


@pytest.fixture(scope="module")
def loaded():
    return load_model(FIXTURES / "mistral_window" / "ckpt_stage2")


def corpus(path, texts):
    path.write_text("".join(json.dumps({"id": f"d{n}", "text": t}) + "\n" for n, t in enumerate(texts)))
    return [str(path)]


def test_means_are_those_of_the_alignment_loss(loaded, tmp_path):
    """If this broke, the map would show another distance than the one that training makes small."""
    texts = ["A city", "The river is long", "It is a book that she wrote"]
    means = mean_states(loaded, corpus(tmp_path / "c.jsonl", texts), 500)
    assert means.ids == ["d0", "d1", "d2"]
    for row, text in enumerate(texts):
        ids, _ = loaded.tokenizer.encode_passage(text, loaded.checkpoint.doc_max_length)
        inputs = pad_encoder_inputs([ids], loaded.tokenizer.special, len(ids) + loaded.tokenizer.special.num_memory)
        _, alignment = loaded.model.encode(loaded.params, "compressor", jax.tree.map(jnp.asarray, inputs))
        # float32 sums in another order, of a difference of similar numbers.
        found = np.mean(np.square(means.document[row] - means.memory[row]))
        np.testing.assert_allclose(found, alignment[0], rtol=1e-3)


def test_pca_keeps_distances_that_lie_in_a_plane():
    """If this broke, points near each other on the map would not be so in the model."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(8, 2)))[0].T
    document, memory = (rng.normal(size=(5, 2)) for _ in range(2))
    means = Means(list("abcde"), *((x @ axes + 3.0).astype(np.float32) for x in (document, memory)), cut=0)
    plane = project(means, "pca")
    between = np.linalg.norm(plane.document - plane.memory, axis=1)
    np.testing.assert_allclose(between, np.linalg.norm(document - memory, axis=1), rtol=1e-4)  # float32
    assert sum(plane.explained) == pytest.approx(1.0, abs=1e-5)
    assert means.distance() == pytest.approx(between.mean(), rel=1e-4)


def test_cosine_of_known_vectors():
    """If this broke, the printed cosine would be wrong: 1 and 0 have the mean 0.5."""
    means = Means(["a", "b"], *(np.array(x, np.float32) for x in ([[2, 0], [0, 1]], [[3, 0], [5, 0]])), cut=0)
    assert means.cosine() == pytest.approx(0.5)


def test_tsne_of_few_documents():
    """If this broke, small corpora would stop with scikit-learn's complaint about its perplexity."""
    pytest.importorskip("sklearn")
    points = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    plane = project(Means(list("abc"), *points, cut=0), "tsne", seed=1)
    assert plane.document.shape == plane.memory.shape == (3, 2) and plane.explained is None
    np.testing.assert_array_equal(plane.memory, project(Means(list("abc"), *points, cut=0), "tsne", seed=1).memory)


def test_too_few_documents(loaded, tmp_path):
    """A map of one document would be two points."""
    with pytest.raises(UserError, match="1 documents make no map"):
        mean_states(loaded, corpus(tmp_path / "c.jsonl", ["A city"]), 500)
