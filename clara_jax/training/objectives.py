"""The losses of the four stages: pure functions `(trainable, frozen, batch, rng) -> (loss, metrics)`.

Metrics hold the losses as scalars, what belongs to single samples (`scores`, `selected`), and under `retrieval`
the sums that recall and precision are made of.

Every mean is a sum over a count. `counts(batch)` gives the counts; passing the counts of a larger batch
makes the losses of its parts add up to the loss of the whole, so that neither accumulation nor the number of
devices changes a gradient.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PRNGKeyArray

from clara_jax.data.collate import Batch
from clara_jax.errors import fail
from clara_jax.models.roles import Params, RoleModel, cosine_scores
from clara_jax.models.top_k import Estimator, TopK, select_top_k
from clara_jax.scoring.retrieval_sums import retrieval_sums

Metrics = dict[str, Any]
Objective = Callable[..., tuple[Float[Array, ""], Metrics]]


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Weights and choices of the losses.

    Args:
        mse_weight: Weight of the alignment loss between memory and document states (paper, lambda = 0.1).
        top_k: Memories handed to the generator in end-to-end training.
        temperature: Softmax temperature of the differentiable top-k and of the contrastive loss.
        estimator: Gradient estimator of the top-k, `sequential` (the paper's) or `gumbel`. Its noise is added to
            cosines: it learned well at a temperature of 1, and not at 0.02 (experiments/README.md).
        exact_mask: Remove already selected memories wholly from later slots' softmax.
        noise_in_forward: Let the gumbel estimator's noise take part in the selection.

    """

    mse_weight: float = 0.1
    top_k: int = 5
    temperature: float = 0.02
    estimator: Estimator = "sequential"
    exact_mask: bool = False
    noise_in_forward: bool = False

    def __post_init__(self) -> None:
        if self.mse_weight < 0:
            fail(f"objective.mse_weight is {self.mse_weight}", "Give 0 or a positive number")
        if self.top_k < 1:
            fail(f"objective.top_k is {self.top_k}", "Give at least 1")
        if not self.temperature > 0:
            fail(f"objective.temperature is {self.temperature}", "Give a positive number")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counts:
    """What the means of one batch divide by."""

    targets: Float[Array, ""]
    documents: Float[Array, ""]
    questions: Float[Array, ""]


def counts(batch: Batch) -> Counts:
    """Answer tokens, existing documents, and questions with at least one known positive."""
    zero = jnp.zeros((), jnp.float32)
    return Counts(
        targets=zero if batch.prompts is None else jnp.sum(batch.prompts.target_weights),
        documents=jnp.sum(batch.candidates, dtype=jnp.float32),
        questions=zero if batch.positives is None else jnp.sum(_has_positive(batch), dtype=jnp.float32),
    )


def compression_objective(model: RoleModel, config: ObjectiveConfig) -> Objective:
    """Stages `compression_pretraining` and `instruction_tuning`.

    Cross-entropy of the answer given the documents' memories, plus `mse_weight` times the alignment loss.
    """

    def objective(
        trainable: Params, frozen: Params, batch: Batch, rng: PRNGKeyArray | None, totals: Counts | None = None
    ) -> tuple[Array, Metrics]:
        params, totals = {**frozen, **trainable}, totals or counts(batch)
        encoder_rng, generator_rng = _split(rng, 2)
        assert batch.documents is not None
        memories, alignment = model.encode(params, "compressor", batch.documents, encoder_rng, batch.rows)
        loss = _answer_loss(model, params, batch, memories, generator_rng, totals)
        mse = jnp.sum(jnp.where(batch.candidates, alignment, 0.0)) / jnp.maximum(totals.documents, 1)
        total = loss + config.mse_weight * mse
        return total, {"loss": total, "cross_entropy": loss, "mse": mse}

    return objective


def end_to_end_objective(model: RoleModel, config: ObjectiveConfig) -> Objective:
    """Stage `end_to_end`: the answer's cross-entropy teaches the query reasoner what to retrieve.

    Candidates are scored by cosine similarity with the question, the best `top_k` go into the prompt in
    score order, and the gradient reaches the scores through the differentiable top-k (paper, Sec. 3.3). The
    candidates' memories receive a gradient only where the compressor is trained.
    """
    how = TopK(
        config.top_k,
        config.temperature,
        config.estimator,
        config.exact_mask,
        config.noise_in_forward,
    )

    def objective(
        trainable: Params, frozen: Params, batch: Batch, rng: PRNGKeyArray | None, totals: Counts | None = None
    ) -> tuple[Array, Metrics]:
        params, totals = {**frozen, **trainable}, totals or counts(batch)
        encoder_rng, question_rng, generator_rng, noise_rng = _split(rng, 4)
        memories = candidate_memories(model, params, batch, encoder_rng)
        if "compressor" not in trainable:
            memories = jax.lax.stop_gradient(memories)
        scores = candidate_scores(model, params, batch, memories, question_rng)
        selected, indices = select_top_k(
            scores,
            memories,
            how.k,
            how.temperature,
            # Without rng (evaluation) there is no noise to draw, and no gradient to estimate.
            "sequential" if noise_rng is None else how.estimator,
            _of_rows(noise_rng, batch),
            exact_mask=how.exact_mask,
            noise_in_forward=how.noise_in_forward and noise_rng is not None,
        )
        loss = _answer_loss(model, params, batch, selected, generator_rng, totals)
        metrics: Metrics = {"loss": loss, "cross_entropy": loss, "scores": scores, "selected": indices}
        return loss, metrics | _found(batch, scores)

    return objective


def retrieval_objective(model: RoleModel, config: ObjectiveConfig) -> Objective:
    """Stage `retrieval_pretraining`: contrastive loss over each question's candidates.

    -log of the positives' share of softmax(cosine / temperature), mean over questions with a positive.
    """

    def objective(
        trainable: Params, frozen: Params, batch: Batch, rng: PRNGKeyArray | None, totals: Counts | None = None
    ) -> tuple[Array, Metrics]:
        params, totals = {**frozen, **trainable}, totals or counts(batch)
        encoder_rng, question_rng = _split(rng, 2)
        memories = jax.lax.stop_gradient(candidate_memories(model, params, batch, encoder_rng))
        assert batch.positives is not None
        scores = candidate_scores(model, params, batch, memories, question_rng)
        logits = scores / config.temperature
        has_positive = _has_positive(batch)
        losses = _contrastive_losses(logits, jnp.asarray(batch.positives), jnp.asarray(batch.candidates))
        loss = jnp.sum(jnp.where(has_positive, losses, 0.0)) / jnp.maximum(totals.questions, 1)
        ranking = jnp.argsort(-scores, axis=1, stable=True)
        metrics: Metrics = {"loss": loss, "scores": scores, "selected": ranking[:, : config.top_k]}
        return loss, metrics | _found(batch, scores)

    return objective


def candidate_memories(
    model: RoleModel, params: Params, batch: Batch, rng: PRNGKeyArray | None = None
) -> Float[Array, "batch candidates memory hidden"]:
    """The stored memories of the batch if it has them, else its documents read by the compressor."""
    if batch.memories is not None:
        return jnp.asarray(batch.memories)
    assert batch.documents is not None
    return model.encode(params, "compressor", batch.documents, rng, batch.rows)[0]


def candidate_scores(
    model: RoleModel,
    params: Params,
    batch: Batch,
    memories: Float[Array, "batch candidates memory hidden"],
    rng: PRNGKeyArray | None = None,
) -> Float[Array, "batch candidates"]:
    """Cosine of each question, read by the query reasoner, with its candidates; -inf for those that do not exist."""
    assert batch.questions is not None
    queries, _ = model.encode(params, "query_reasoner", batch.questions, rng, batch.rows)
    return jnp.where(batch.candidates, cosine_scores(queries, memories), -jnp.inf)


def _answer_loss(
    model: RoleModel, params: Params, batch: Batch, memories: Array, rng: PRNGKeyArray | None, totals: Counts
) -> Array:
    """Cross-entropy in float32, over all answer tokens (long answers weigh more, as in the reference)."""
    assert batch.prompts is not None
    logits = model.target_logits(params, batch.prompts, memories, rng, batch.rows)
    # Summed rather than looked up: logits may lie in parts of the vocabulary (`over_vocabulary`).
    is_target = jnp.arange(logits.shape[-1]) == batch.prompts.target_tokens[:, :, None]
    picked = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.sum(losses * batch.prompts.target_weights) / jnp.maximum(totals.targets, 1)


def _contrastive_losses(logits: Array, positives: Array, candidates: Array) -> Array:
    """-log of the positives' share of softmax(logits), per row; 0 where there is nothing to tell apart.

    Written as softplus(logsumexp of the others - logsumexp of the positives): unlike the difference of two
    nearly equal log-sum-exps it keeps its digits when the positives already have nearly all of the mass.
    """
    positives = positives & candidates
    others = candidates & ~positives
    both = jnp.any(positives, axis=1, keepdims=True) & jnp.any(others, axis=1, keepdims=True)
    # A row with an empty side would put NaN into the gradient: let it compare all with all, and drop it.
    of_positives = jax.nn.logsumexp(jnp.where(positives | ~both, logits, -jnp.inf), axis=1)
    of_others = jax.nn.logsumexp(jnp.where(others | ~both, logits, -jnp.inf), axis=1)
    return jnp.where(both[:, 0], jax.nn.softplus(of_others - of_positives), 0.0)


def _has_positive(batch: Batch) -> Array:
    return jnp.any(jnp.asarray(batch.positives) & jnp.asarray(batch.candidates), axis=1)


def _found(batch: Batch, scores: Array) -> Metrics:
    if batch.positives is None:
        return {}
    return {"retrieval": retrieval_sums(scores, jnp.asarray(batch.positives), jnp.asarray(batch.candidates))}


def _of_rows(rng: PRNGKeyArray | None, batch: Batch) -> Key[Array, " batch"] | None:
    """A key for every sample, which does not depend on how the batch is cut."""
    if rng is None:
        return None
    rows = jnp.arange(batch.candidates.shape[0]) if batch.rows is None else batch.rows
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, rows)


def _split(rng: PRNGKeyArray | None, parts: int) -> list[PRNGKeyArray | None]:
    return [None] * parts if rng is None else list(jax.random.split(rng, parts))
