"""FLOPs counted from shapes, against what XLA counts in the compiled passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clara_jax.data.collate import Batch
from clara_jax.models.decoder import Decoder
from clara_jax.models.lora import adapter_shapes
from clara_jax.models.roles import EncoderInputs, GeneratorInputs
from clara_jax.training.flops import (
    Lengths,
    backward_flops,
    batch_lengths,
    forward_flops,
    peak_flops,
    step_flops,
    vocabulary_flops,
)
from tests.models.tiny import tiny_config

RANK, ROWS, LENGTH = 32, 2, 64
# XLA counts the layers' loop once: one layer. Large enough that the products outweigh norms and softmax.
CONFIG = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_layers": 1,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 32,
    "vocab_size": 512,
}


def xla_flops(function, *shapes) -> float:
    return jax.jit(function).lower(*shapes).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("fused", [False, True])
def test_layers_cost_what_xla_counts(fused):
    """If this broke, the reported MFU would be that of another model."""
    config = tiny_config(**CONFIG, fused_projections=fused)
    decoder = Decoder(config, jnp.float32)
    base, lora = decoder.abstract_base(), adapter_shapes(config, RANK)
    inputs = jax.ShapeDtypeStruct((ROWS, LENGTH, config.hidden_size), jnp.float32)
    valid = jnp.ones((ROWS, LENGTH), bool)

    def forward(base, lora, inputs):
        return decoder.apply({"params": base, "lora": lora}, inputs, valid)[0].sum()

    lengths = np.full(ROWS, LENGTH)
    # The decoder multiplies whole [LENGTH, LENGTH] matrices; counted are the pairs below the diagonal.
    masked = 4 * ROWS * config.num_heads * config.head_dim * LENGTH * (LENGTH - 1) / 2
    found = xla_flops(forward, base, lora, inputs)
    assert forward_flops(config, RANK, lengths) + masked == pytest.approx(found, rel=0.03)
    both = xla_flops(jax.grad(forward, argnums=(1, 2)), base, lora, inputs)
    counted = forward_flops(config, RANK, lengths) + backward_flops(config, RANK, lengths) + 3 * masked
    assert counted == pytest.approx(both, rel=0.03)
    # A frozen adapter that a gradient leads through, as the generator's when only the query reasoner is trained.
    through = xla_flops(jax.grad(forward, argnums=2), base, lora, inputs)
    spared = backward_flops(config, RANK, lengths) - backward_flops(config, RANK, lengths, trains_adapter=False)
    assert both - through == pytest.approx(spared, rel=0.05)


def test_logits_cost_what_xla_counts():
    """If this broke, MFU would be wrong by the vocabulary projection, a third of a small model."""
    config = tiny_config(**CONFIG)
    decoder = Decoder(config, jnp.float32)
    hidden = jax.ShapeDtypeStruct((7, config.hidden_size), jnp.float32)
    found = xla_flops(lambda p, h: decoder.apply({"params": p}, h, method="logits"), decoder.abstract_base(), hidden)
    assert vocabulary_flops(config, 7) == pytest.approx(found, rel=0.01)


def test_attention_counts_the_pairs_of_real_tokens():
    """If this broke, long rows, rows of unequal length and sliding windows would be counted wrongly."""
    lengths = np.array([1, 5, 9])

    def pairs(windows):
        flops = forward_flops(tiny_config(windows=windows), RANK, lengths)
        # Two products of 2 heads x 8 dims, beyond what attends to itself alone.
        return (flops - forward_flops(tiny_config(windows=(1, 1)), RANK, lengths)) / (4 * 2 * 8)

    def loop(window):
        return sum(min(i + 1, window or 99) - 1 for length in lengths for i in range(length))

    assert pairs((4, 0)) == loop(4) + loop(0)
    assert pairs(()) == 2 * loop(0)


@pytest.mark.parametrize(
    ("stage", "trainable", "forward", "backward"),
    [
        ("instruction_tuning", ("compressor", "generator", "memory_tokens"), "dp", {"d": True, "p": True}),
        ("compression_pretraining", ("generator",), "dp", {"p": True}),
        ("compression_pretraining", ("memory_tokens",), "dp", {"d": False, "p": False}),
        ("end_to_end", ("query_reasoner", "generator"), "dqp", {"q": True, "p": True}),
        ("end_to_end", ("query_reasoner",), "dqp", {"q": True, "p": False}),
        ("end_to_end", ("compressor", "generator"), "dqp", {"d": True, "p": True}),
        ("end_to_end", ("memory_tokens",), "dqp", {"q": False, "p": False}),
        ("retrieval_pretraining", ("query_reasoner",), "dq", {"q": True}),
        ("retrieval_pretraining", ("query_reasoner", "compressor"), "dq", {"q": True}),
    ],
)
def test_a_step_counts_the_passes_of_its_stage(stage, trainable, forward, backward):
    """If this broke, MFU would count a backward pass that is not taken, or miss one."""
    config = tiny_config()
    rows = {"d": np.array([20, 30, 40]), "q": np.array([9]), "p": np.array([50])}
    lengths = Lengths(rows["d"], rows["q"], rows["p"], targets=11)
    expected = sum(forward_flops(config, RANK, rows[role]) for role in forward)
    expected += sum(backward_flops(config, RANK, rows[role], trains) for role, trains in backward.items())
    expected += 2 * vocabulary_flops(config, 11) if "p" in forward else 0
    assert step_flops(config, RANK, stage, trainable, lengths) == pytest.approx(expected)


def test_lengths_leave_out_padding_and_missing_documents():
    """If this broke, MFU would rise with padding."""
    exists = np.array([[True, False], [True, True]])
    valid = np.arange(6) < np.array([[[3], [1]], [[4], [6]]])
    documents = EncoderInputs(np.zeros(valid.shape, np.int32), valid, np.zeros((2, 2, 1), np.int32))
    prompt_valid = np.arange(8) < np.array([[5], [8]])
    zeros = np.zeros((2, 3), np.int32)
    weights = np.array([[1, 1, 0], [1, 0, 0]], np.float32)
    prompts = GeneratorInputs(
        np.zeros((2, 8), np.int32), prompt_valid, np.zeros((2, 1, 1), np.int32), zeros, zeros, weights
    )
    lengths = batch_lengths(Batch(documents, exists, prompts))
    assert (lengths.documents.tolist(), lengths.prompts.tolist(), lengths.targets) == ([3, 4, 6], [5, 8], 3)
    assert lengths.questions.size == 0


def test_unknown_devices_have_no_peak():
    """If this broke, MFU on a new device would be a made-up number."""
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("cpu") is None
