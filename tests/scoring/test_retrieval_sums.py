"""Recall and precision of ranked candidates, against plain loops over rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clara_jax.scoring.retrieval_sums import retrieval_means, retrieval_sums


def loops(scores, positives, candidates, ks):
    """The definition, one row at a time."""
    sums = dict.fromkeys(("rows", *(f"{kind}@{k}" for kind in ("recall", "precision") for k in ks)), 0.0)
    for row in range(len(scores)):
        existing = [i for i in range(scores.shape[1]) if candidates[row, i] and scores[row, i] != -np.inf]
        wanted = {i for i in existing if positives[row, i]}
        ranking = sorted(existing, key=lambda i: (-scores[row, i], i))
        if not wanted:
            continue
        sums["rows"] += 1
        for k in ks:
            found = len(wanted & set(ranking[:k]))
            sums[f"recall@{k}"] += found / len(wanted)
            sums[f"precision@{k}"] += found / k
    return sums


@pytest.mark.parametrize("ks", [(1, 3, 5), (2, 20)])
def test_sums_are_those_of_the_definition(ks):
    """If this broke, the retrieval numbers of training and evaluation would be wrong.

    Scores have ties; rows lack candidates and positives, all of them in some rows; one k is larger than any row.
    """
    rng = np.random.default_rng(0)
    scores = rng.integers(-3, 3, (64, 8)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.1] = -np.inf
    candidates = rng.random(scores.shape) < rng.random((64, 1))
    positives = rng.random(scores.shape) < 0.3
    arrays = [jnp.asarray(x) for x in (scores, positives, candidates)]
    got = jax.jit(lambda *x: retrieval_sums(*x, ks=ks))(*arrays)
    want = loops(scores, positives, candidates, ks)
    assert 0 < want["rows"] < 64
    assert {name: float(value) for name, value in got.items()} == pytest.approx(want, rel=1e-6)
    means = retrieval_means(got)
    assert means == pytest.approx({name: want[name] / want["rows"] for name in want if name != "rows"}, rel=1e-6)
    assert all(0 <= value <= 1 for value in means.values())


def test_sums_of_parts_add_up():
    """If this broke, recall would depend on the batch size or on the number of devices."""
    rng = np.random.default_rng(1)
    scores = jnp.asarray(rng.normal(size=(12, 6)), jnp.float32)
    positives, candidates = (jnp.asarray(rng.random((12, 6)) < share) for share in (0.2, 0.8))
    whole = retrieval_sums(scores, positives, candidates)
    parts = [retrieval_sums(scores[cut], positives[cut], candidates[cut]) for cut in (slice(0, 5), slice(5, 12))]
    added = jax.tree.map(jnp.add, *parts)
    assert {k: float(v) for k, v in added.items()} == pytest.approx({k: float(v) for k, v in whole.items()}, rel=1e-6)


def test_no_positives_give_no_numbers():
    """If this broke, data without known positives would log a recall of 0 or NaN."""
    nothing = jnp.zeros((2, 3), bool)
    assert retrieval_means(retrieval_sums(jnp.ones((2, 3)), nothing, ~nothing)) == {}


def test_diverged_scores_count_as_misses():
    """If this broke, a model whose scores are NaN would still show a good recall."""
    scores = jnp.asarray([[jnp.nan, 0.0, 1.0]])
    positives = jnp.asarray([[True, False, False]])
    assert retrieval_means(retrieval_sums(scores, positives, jnp.ones((1, 3), bool)))["recall@1"] == 0
