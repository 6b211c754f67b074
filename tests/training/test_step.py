"""The sharded step: no mesh, no number of micro-batches and no device count may change what a run computes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clara_jax import pretrained
from clara_jax.data.collate import Batch, pad_candidates, pad_encoder_inputs, pad_exchanges
from clara_jax.data.samples import Exchange
from clara_jax.errors import UserError
from clara_jax.models.lora import LoraConfig
from clara_jax.pretrained import Pretrained, with_query_reasoner
from clara_jax.sharding import MeshConfig, base_sharding, check_heads, make_mesh, place, place_batch, replicated
from clara_jax.training.objectives import ObjectiveConfig, counts
from clara_jax.training.stages import STAGES
from clara_jax.training.state import init_state
from clara_jax.training.step import check_batch, make_evaluation, make_step
from tests.conftest import FIXTURES

ROWS, STEPS = 16, 3
# Sums over devices are taken in another order: float32 rounding, magnified where scores are divided by 0.02.
CLOSE = 1e-5
TRAINS = {
    "compression_pretraining": ("compressor", "generator", "memory_tokens"),
    "end_to_end": ("compressor", "query_reasoner", "generator"),
    "retrieval_pretraining": ("query_reasoner",),
}
# Each axis alone, and each combination. (All fourteen meshes of 2, 4 and 8 devices that divide this base were run.)
MESHES = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (8, 1, 1), (2, 4, 1), (4, 1, 2), (1, 4, 2), (2, 2, 2)]


@functools.cache
def model() -> Pretrained:
    """A tiny model whose adapters all change something, with dropout."""
    fresh = pretrained.new_model(str(FIXTURES / "mistral_window" / "base"), 32, 8, LoraConfig(rank=2), seed=0)
    decoder = dataclasses.replace(fresh.model.decoder, lora_dropout=0.1)
    params = with_query_reasoner(fresh.params)
    moved = {name: jax.tree.map(_shifted, tree) for name, tree in params.items() if name != "base"}
    return dataclasses.replace(
        fresh, model=dataclasses.replace(fresh.model, decoder=decoder), params={"base": params["base"], **moved}
    )


def _shifted(leaf: jax.Array) -> jax.Array:
    return leaf + 0.05 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape)


@functools.cache
def batch(stage: str = "end_to_end") -> Batch:
    """Sixteen samples of different lengths; some lack a candidate, some a positive.

    Compression reads all documents, the other stages the best two.
    """
    special, rng = model().tokenizer.special, np.random.default_rng(0)

    def text(low: int, high: int) -> list[int]:
        return rng.integers(5, 90, rng.integers(low, high)).tolist()

    documents = [[text(3, 30) for _ in range(rng.integers(2, 4))] for _ in range(ROWS)]
    exchanges = []
    slots = [len(row) if stage == "compression_pretraining" else 2 for row in documents]
    for memories in slots:
        prompt = text(4, 5) + [*special.memory_ids, special.sep] * memories + text(3, 4)
        exchanges.append(Exchange(prompt + text(1, 9), len(prompt)))
    padded, exists = pad_candidates(documents, special, 40, at_least=3)
    positives = np.zeros((ROWS, 3), bool)
    positives[:12, 1] = True
    return Batch(
        padded,
        exists,
        pad_exchanges(exchanges, slots, special, 48, 10),
        pad_encoder_inputs([text(3, 9) for _ in range(ROWS)], special, 20),
        positives,
        np.arange(ROWS, dtype=np.int32),
    )


def objective_of(stage: str):
    noisy = ObjectiveConfig(top_k=2, estimator="gumbel", noise_in_forward=True)
    return STAGES[stage].objective(model().model, noisy)


def placed(stage: str, mesh):
    """(trainable, frozen) on the mesh."""
    params, whole = model().params, replicated(mesh)

    def place_base(path, leaf):
        return place(leaf, base_sharding(mesh, tuple(key.key for key in path), leaf.shape))

    everything = {
        name: jax.tree_util.tree_map_with_path(place_base, tree)
        if name == "base"
        else jax.tree.map(lambda leaf: place(leaf, whole), tree)
        for name, tree in params.items()
    }
    trains = TRAINS[stage]
    return {name: everything[name] for name in trains}, {k: v for k, v in everything.items() if k not in trains}


@functools.cache
def run(stage: str, shape: tuple[int, int, int], micro_batches: int):
    """Losses, gradient norms and retrieval sums of some steps, and the trained weights after them."""
    mesh = make_mesh(MeshConfig(*shape))
    optimizer = optax.sgd(1e-3)  # adaptive moments would hide a wrong scale of the gradient
    trainable, frozen = placed(stage, mesh)
    state = jax.tree.map(lambda leaf: place(leaf, replicated(mesh)), init_state(trainable, optimizer, seed=0))
    step = make_step(objective_of(stage), optimizer, mesh, micro_batches)
    seen = []
    for _ in range(STEPS):
        state, metrics = step(state, frozen, place_batch(mesh, batch(stage), ROWS))
        seen.append(jax.device_get(metrics))
    return seen, np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(state.trainable)])


def assert_same(found, expected):
    for mine, theirs in zip(found[0], expected[0], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=CLOSE)
        assert mine["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4)
        for name, value in theirs.get("retrieval", {}).items():
            assert mine["retrieval"][name] == pytest.approx(value, rel=1e-6)
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=1e-5 * np.abs(expected[1]).max())


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_every_mesh_gives_the_steps_of_one_device(shape):
    """Stage 3 with dropout and noise: whoever moves a run to other devices gets the same run."""
    micro_batches = 2 if ROWS % (2 * shape[0] * shape[1]) == 0 and sum(shape) % 2 else 1
    assert_same(run("end_to_end", shape, micro_batches), run("end_to_end", (1, 1, 1), 1))


@pytest.mark.parametrize("stage", ["compression_pretraining", "retrieval_pretraining"])
@pytest.mark.parametrize(("shape", "micro_batches"), [((1, 1, 1), 4), ((2, 2, 2), 2)], ids=str)
def test_accumulation_changes_nothing(stage, shape, micro_batches):
    """Micro-batches with different numbers of answers, documents and questions still give the whole batch's loss."""
    assert_same(run(stage, shape, micro_batches), run(stage, (1, 1, 1), 1))


def test_a_step_is_not_made_of_nothing():
    """The comparisons above would hold for a step that ignores its batch or trains nothing."""
    seen, _ = run("end_to_end", (1, 1, 1), 1)
    losses = [float(metrics["loss"]) for metrics in seen]
    assert len(set(losses)) == STEPS and seen[0]["retrieval"]["rows"] == 12


def test_evaluation_of_parts_adds_up():
    """With the counts of all, the losses of two halves on a mesh are the loss of the whole on one device."""
    mesh, alone = make_mesh(MeshConfig(2, 2, 1)), make_mesh(MeshConfig(1, 1, 1))
    whole = batch("compression_pretraining")
    totals = counts(whole)
    evaluate = make_evaluation(objective_of("compression_pretraining"), alone)
    expected = evaluate(*placed("compression_pretraining", alone), place_batch(alone, whole, ROWS), totals)
    evaluate = make_evaluation(objective_of("compression_pretraining"), mesh)
    found = 0.0
    for part in (slice(0, 8), slice(8, 16)):
        half = jax.tree.map(lambda leaf, part=part: leaf[part], whole)
        found += evaluate(*placed("compression_pretraining", mesh), place_batch(mesh, half, 8), totals)["loss"]
    assert float(found) == pytest.approx(float(expected["loss"]), rel=CLOSE)


def test_base_weights_are_divided():
    """A mesh with fsdp and tensor axes must hold a quarter of each large weight per device, not all of it."""
    mesh = make_mesh(MeshConfig(2, 2, 2))
    _, frozen = placed("end_to_end", mesh)
    kernel = frozen["base"]["layers"]["q_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    assert frozen["base"]["embed"].addressable_shards[0].data.size * 2 == frozen["base"]["embed"].size


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        (lambda: make_mesh(MeshConfig(data=3, fsdp=3)), "mesh: data 3 x fsdp 3"),
        (lambda: make_mesh(MeshConfig(fsdp=3)), "8 devices"),
        (lambda: MeshConfig(tensor=0), "mesh.tensor"),
        (lambda: MeshConfig(data=0), "mesh.data"),
        (lambda: check_heads(make_mesh(MeshConfig(tensor=4)), 4, 2), "2 key-value heads"),
        (lambda: check_batch(make_mesh(MeshConfig(4, 2, 1)), 24, 2), "batch_size is 24"),
        (lambda: base_sharding(make_mesh(MeshConfig(fsdp=8)), ("embed",), (32, 12)), "mesh.fsdp is 8"),
    ],
)
def test_what_does_not_divide_is_refused(wrong, names):
    """The message names the key, so that the user knows what to change before a pod is rented."""
    with pytest.raises(UserError, match=names):
        wrong()
