"""Tiny decoders for the tests of this folder."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clara_jax.models.config import DecoderConfig, Rope
from clara_jax.models.decoder import Decoder
from clara_jax.models.lora import Adapter, adapter_shapes

# Compiling costs seconds here and running nothing: leave the optimiser out.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def tiny_config(**changes: Any) -> DecoderConfig:
    """Two layers of hidden size 16, two heads sharing one key-value head."""
    fields: dict[str, Any] = {
        "family": "mistral",
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 8,
        "rope": Rope(theta=1000.0, rotary_dim=8),
    }
    return DecoderConfig(**(fields | changes))


def random_tree(shapes: Any, seed: int, spread: float = 0.3) -> Any:
    """The tree filled with normal numbers, every leaf with its own."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * spread, jnp.float32), shapes)


def random_base(decoder: Decoder, seed: int = 0) -> Any:
    """Base parameters whose norms differ from one and whose biases differ from zero."""
    base = random_tree(decoder.abstract_base(), seed)
    norms = {name: 1 + base["layers"][name] for name in base["layers"] if name.endswith("norm")}
    return base | {"layers": base["layers"] | norms, "final_norm": 1 + base["final_norm"]}


def random_adapter(config: DecoderConfig, rank: int, seed: int = 1) -> Adapter:
    """An adapter with A and B of like size, so that a missing term shows."""
    return random_tree(adapter_shapes(config, rank), seed)


def random_embeddings(rows: int, length: int, hidden: int = 16, seed: int = 2) -> jax.Array:
    """Inputs of a decoder."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, length, hidden)), jnp.float32)
