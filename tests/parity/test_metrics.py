"""The recorded scores of answers and rankings."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from clara_jax.scoring.answers import cover_exact_match, exact_match, f1, normalise
from clara_jax.scoring.retrieval_sums import retrieval_means, retrieval_sums


def test_answer_scores(recorded):
    """If this broke, exact match and F1 could not be compared with published ones."""
    pairs = json.loads(recorded("metrics.json").read_text(encoding="utf-8"))["pairs"]
    assert pairs
    for pair in pairs:
        prediction, answer = pair["prediction"], pair["ground_truth"]
        assert normalise(prediction) == pair["normalized_prediction"]
        assert normalise(answer) == pair["normalized_ground_truth"]
        assert exact_match(prediction, answer) == float(pair["exact_match"]), pair
        assert cover_exact_match(prediction, answer) == float(pair["cover_exact_match"]), pair
        assert f1(prediction, answer) == pytest.approx(pair["f1"], rel=1e-12), pair


def test_retrieval_scores(recorded):
    """If this broke, recall and precision could not be compared with published ones."""
    cases = json.loads(recorded("metrics.json").read_text(encoding="utf-8"))["retrieval"]
    assert cases
    for case in cases:
        if any(len(set(ranking)) < len(ranking) for ranking in case["pred"]):
            continue  # no ranking of candidates names one twice
        arrays = as_scores(case["pos"], case["pred"], max(case["k_values"]))
        sums = retrieval_sums(*arrays, ks=case["k_values"])
        means = retrieval_means(sums)
        assert float(sums["rows"]) == case["valid_samples"]
        for name, value in case["metrics"].items():
            assert means.get(name.replace("_", "@"), 0.0) == pytest.approx(value, rel=1e-6), (case, name)


def as_scores(positives, rankings, longest):
    """Scores by which the candidates come in the recorded order.

    A recorded ranking may end early: then `longest` candidates that nobody wants follow it, and last what it left out.
    """
    size = 1 + max(i for row in positives + rankings for i in row)
    scores = np.concatenate([np.full((len(rankings), size), -1.0), np.zeros((len(rankings), longest))], axis=1)
    wanted = np.zeros(scores.shape, bool)
    for row, ranking in enumerate(rankings):
        scores[row, ranking] = np.arange(len(ranking), 0, -1)
        wanted[row, positives[row]] = True
    return jnp.asarray(scores, jnp.float32), jnp.asarray(wanted), jnp.ones(scores.shape, bool)
