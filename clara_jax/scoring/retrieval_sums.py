"""Recall@k and precision@k of ranked candidates, as sums that add up over batches and devices.

The sums of the parts of a data set, added, are the sums of the whole; only then does `retrieval_means` divide. Means
of means would weigh the questions of small batches more.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

KS = (1, 3, 5)


def retrieval_names(ks: Sequence[int] = KS) -> list[str]:
    """Names of what `retrieval_means` gives."""
    return [f"{what}@{k}" for what in ("recall", "precision") for k in ks]


def retrieval_sums(
    scores: Float[Array, "batch candidates"],
    positives: Bool[Array, "batch candidates"],
    candidates: Bool[Array, "batch candidates"],
    ks: Sequence[int] = KS,
) -> dict[str, Float[Array, ""]]:
    """Sums of `recall@k` and `precision@k` over the rows that have a positive, and `rows`, their number (float32).

    A candidate exists if `candidates` says so and its score is not -inf; others are neither found nor wanted. The best
    k of a row are those of the highest scores, of equal scores the ones that come first. Recall is the share of the
    row's positives among them; precision is their number over k, even where the row has fewer than k candidates.
    A score of NaN ranks last.
    """
    exists = candidates & ~jnp.isneginf(scores)
    wanted = positives & exists
    order = jnp.argsort(jnp.where(exists, -scores, jnp.inf), axis=1, stable=True)
    hits = jnp.take_along_axis(wanted, order, axis=1)
    number = jnp.sum(wanted, axis=1, dtype=jnp.float32)
    sums = {"rows": jnp.sum(number > 0, dtype=jnp.float32)}
    for k in ks:
        # A row without positives has no hits, and adds 0 to both.
        found = jnp.sum(hits[:, :k], axis=1, dtype=jnp.float32)
        sums[f"recall@{k}"] = jnp.sum(found / jnp.maximum(number, 1))
        sums[f"precision@{k}"] = jnp.sum(found / k)
    return sums


def retrieval_means(sums: Mapping[str, jax.Array | np.ndarray | float]) -> dict[str, float]:
    """Each sum of `retrieval_sums` over the number of rows; empty where no row had a positive."""
    rows = float(sums["rows"])
    if rows == 0:
        return {}
    return {name: float(value) / rows for name, value in sums.items() if name != "rows"}
