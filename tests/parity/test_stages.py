"""Each stage's inputs, states, losses, gradients and first optimizer steps equal the reference's.

Tolerances (float32, CPU): losses and scores 1e-5 relative; memories and logits 1e-4 of the largest entry;
gradients 5e-5 in ||diff|| / ||ref||; losses of three AdamW steps 1e-4. The recordings' own distance from
float64 is up to 5e-6 (logits) and 3e-5 (gradients of stage 2), so these cannot be much tighter.

Where a recording itself is further than that from exact arithmetic (stage 2 divides scores by 0.02, which
magnifies the rounding of the hidden states), equality with it says nothing. There this program is compared
with its own float64 run instead, within the same tolerance (gradients: or as near to it as the recording is), and
the float64 run must lie near the recording (`EXACT_NEAR`), so that a wrong formula cannot pass as rounding.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from clara_jax.clara import Clara
from clara_jax.data.collate import Batch
from clara_jax.models.roles import RoleModel
from clara_jax.training.objectives import ObjectiveConfig
from clara_jax.training.optimizer import OptimizerConfig, make_optimizer
from clara_jax.training.stages import STAGES, StageName, split_trainable
from tests.parity.case import StageCase, load_clara, named_gradients, relative_norm, to_host, worst_entry

LOSS, STATES, GRADIENTS, STEPS = 1e-5, 1e-4, 5e-5, 1e-4
# A wrong window, theta, norm or missing bias moves losses by 1e-2 and gradients by 0.4 (tried on the fixtures).
EXACT_NEAR = 2e-3
STAGE_NAMES: dict[str, StageName] = {
    "stage1_2": "instruction_tuning",
    "stage2": "end_to_end",
    "stage2_pretrain_retrieval": "retrieval_pretraining",
}


@dataclasses.dataclass(frozen=True, eq=False)
class WatchedModel(RoleModel):
    """The model, keeping what its roles return while an objective calls them."""

    seen: dict[str, Any] = dataclasses.field(default_factory=dict)

    def encode(self, params, role, inputs, rng=None, rows=None):
        self.seen[role] = super().encode(params, role, inputs, rng, rows)
        return self.seen[role]

    def target_logits(self, params, inputs, memories, rng=None, rows=None):
        self.seen["logits"] = super().target_logits(params, inputs, memories, rng, rows)
        return self.seen["logits"]


@functools.cache
def stage_function(model: RoleModel, stage: StageName, top_k: int):
    """Loss, gradients and the states on the way, compiled once for all tests of a stage."""
    # The recorded total is always loss + 0.1 mse, where the compressor's share is a constant in stage 2.
    config = ObjectiveConfig(mse_weight=0.1, top_k=top_k, temperature=0.02)
    watched = WatchedModel(model.decoder, model.first_memory_id)
    objective = STAGES[stage].objective(watched, config)

    def with_states(*arguments):
        loss, metrics = objective(*arguments)
        return loss, (metrics, dict(watched.seen))

    def run(*arguments):
        (loss, (metrics, states)), gradients = jax.value_and_grad(with_states, has_aux=True)(*arguments)
        return Result(loss, metrics, gradients, states)

    # Optimised as users' code is, unlike the other tests': without, sums run in another order and stage 2 of Qwen3 is
    # 8e-5 from float64 (with: 2e-5; its recording: 1.2e-4).
    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 3})


class Result(NamedTuple):
    loss: Any
    metrics: dict[str, Any]
    gradients: dict[str, Any]
    states: dict[str, Any]


def stage_name(case: StageCase) -> StageName:
    return STAGE_NAMES.get(case.stage, "compression_pretraining")


def run_stage(case: StageCase, trainable, batch: Batch, clara: Clara | None = None) -> Result:
    """The stage with `trainable` in place of those of the checkpoint's subtrees."""
    clara = clara or case.clara
    function = stage_function(clara.model, stage_name(case), case.texts["generation_top_k"])
    frozen = {name: tree for name, tree in clara.params.items() if name not in trainable}
    return function(trainable, frozen, batch, None)


def differentiated(case: StageCase, params):
    names = {*STAGES[stage_name(case)].trains, "memory_tokens"}
    return split_trainable(params, tuple(sorted(names)))[0]


@functools.cache
def exact(case: StageCase):
    """Loss and gradients in float64."""
    with jax.enable_x64(True):
        clara = load_clara(case.checkpoint, "float64")
        trainable = differentiated(case, clara.params)
        result = run_stage(case, trainable, case.batch("right"), clara)
        return to_host((result.loss, result.gradients))


def assert_loss(case: StageCase, loss: float, recorded: float) -> None:
    if abs(loss - recorded) <= LOSS * recorded:
        return
    truth = float(exact(case)[0])
    assert truth == pytest.approx(recorded, rel=EXACT_NEAR)
    assert loss == pytest.approx(truth, rel=LOSS)


def assert_gradients(case: StageCase, gradients: dict) -> None:
    got = recorded_names(case, gradients)
    for name in [name for name in case.arrays if name.startswith(("grad::", "grad_embed"))]:
        recorded, mine = case.arrays[name], got[name]
        if relative_norm(mine, recorded) > GRADIENTS:
            truth = recorded_names(case, exact(case)[1])[name]
            theirs = relative_norm(recorded, truth)
            assert theirs <= EXACT_NEAR, name
            # Rounding depends on the processor: the worst tensor of qwen3_a stage 2 was 2e-5 from exact on one machine
            # and 7e-5 on another, by the same code. No further from exact than the reference is what can be asked.
            assert relative_norm(mine, truth) <= max(GRADIENTS, theirs), name


def recorded_names(case: StageCase, gradients: dict) -> dict:
    """The gradients by the names that they have in the recordings."""
    adapters = {f"grad::{name}": array for name, array in named_gradients(case, gradients).items()}
    memory_tokens = gradients["memory_tokens"]
    return adapters | {"grad_embed_mem_rows": memory_tokens, "grad_embed_mem_rows_if_enabled": memory_tokens}


def test_inputs_and_labels_are_identical(stage_case: StageCase):
    batch, arrays = stage_case.reference_batch(), stage_case.arrays

    def flat(x):
        return x.reshape(-1, x.shape[-1])

    np.testing.assert_array_equal(flat(batch.documents.tokens), arrays["enc_input_ids"])
    np.testing.assert_array_equal(flat(batch.documents.valid), arrays["enc_attention_mask"])
    np.testing.assert_array_equal(batch.prompts.tokens, arrays["dec_input_ids"])
    np.testing.assert_array_equal(batch.prompts.valid, arrays["dec_attention_mask"])
    labels = np.full(batch.prompts.tokens.shape, -100)
    for row, column in zip(*np.nonzero(batch.prompts.target_weights), strict=True):
        labels[row, batch.prompts.target_columns[row, column] + 1] = batch.prompts.target_tokens[row, column]
    np.testing.assert_array_equal(labels, arrays["labels"])
    if "query_input_ids" in arrays:
        np.testing.assert_array_equal(batch.questions.tokens, arrays["query_input_ids"])
        np.testing.assert_array_equal(batch.questions.valid, arrays["query_attention_mask"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_states_logits_and_scores(stage_case: StageCase, side):
    batch, arrays = stage_case.batch(side), stage_case.arrays
    result = to_host(run_stage(stage_case, differentiated(stage_case, stage_case.clara.params), batch))
    exists = np.asarray(batch.candidates)
    memories, alignment = result.states["compressor"]
    assert worst_entry(memories[exists], arrays["compressed"]) <= STATES
    assert np.mean(alignment[exists]) == pytest.approx(float(arrays["mse_loss"]), rel=LOSS)
    if "scores" in arrays:
        queries = result.states["query_reasoner"][0]
        assert worst_entry(queries.reshape(len(queries), -1), arrays["query_reps"]) <= STATES
        # A cosine can be near zero: its error is measured against the largest score.
        assert worst_entry(result.metrics["scores"], arrays["scores"]) <= LOSS
        np.testing.assert_array_equal(result.metrics["selected"], arrays["topk_idx"])
    if "logits" not in arrays:
        return  # the contrastive stage has no generator pass
    real = np.asarray(batch.prompts.target_weights, bool)
    logits = result.states["logits"][real]
    assert worst_entry(logits[arrays["logits_sel"]], arrays["logits"]) <= STATES
    picked = logits[np.arange(len(logits)), batch.prompts.target_tokens[real]]
    nll = np.asarray(jax.nn.logsumexp(logits, axis=-1)) - picked
    np.testing.assert_allclose(nll, arrays["label_nll"], rtol=STATES, atol=STATES)


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_and_gradients(stage_case: StageCase, side):
    arrays, params = stage_case.arrays, stage_case.clara.params
    result = to_host(run_stage(stage_case, differentiated(stage_case, params), stage_case.batch(side)))
    total = float(arrays["loss"] if stage_case.stage.startswith("stage2") else arrays["total_loss"])
    assert_loss(stage_case, float(result.loss), total)
    if "mse" in result.metrics:
        assert float(result.metrics["mse"]) == pytest.approx(float(arrays["mse_loss"]), rel=LOSS)
    assert_gradients(stage_case, result.gradients)


def test_three_optimizer_steps(stage_case: StageCase):
    arrays, batch = stage_case.arrays, stage_case.batch("right")
    if "train_loss" not in arrays:
        pytest.skip("the recording has no training steps")
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-4, schedule="constant"), steps=3)
    params = stage_case.clara.params
    current = differentiated(stage_case, params)
    names = STAGES[stage_name(stage_case)].trains
    if "trained_embed_mem_rows" not in arrays:  # the reference froze them in this recording
        names = tuple(name for name in names if name != "memory_tokens")
    # One flat vector: clipping and AdamW do not care about its parts, and it compiles in no time.
    flat, unflatten = ravel_pytree({name: current[name] for name in names})
    state = optimizer.init(flat)
    update = jax.jit(optimizer.update)
    key = "train_loss" if stage_case.stage.startswith("stage2") else "train_total"
    for number in range(4):
        result = run_stage(stage_case, {**current, **unflatten(flat)}, batch)
        assert float(result.loss) == pytest.approx(float(arrays[key][number]), rel=STEPS), f"step {number}"
        if "train_topk_idx" in arrays:
            np.testing.assert_array_equal(result.metrics["selected"], arrays["train_topk_idx"][number])
        if number == 3:
            break
        gradients, _ = ravel_pytree({name: result.gradients[name] for name in names})
        norm = float(jnp.linalg.norm(gradients))
        assert norm == pytest.approx(float(arrays["train_grad_norm"][number]), rel=STEPS)
        updates, state = update(gradients, state, flat)
        flat = optax.apply_updates(flat, updates)
