"""The tiny base: its configuration, its training step, its measurement, and its Hugging Face folder."""

import functools
import json
import math
import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jaxtyping import Array

from clara_jax.data.tokenizer import ClaraTokenizer
from clara_jax.interop.base import save_base
from clara_jax.models.config import decoder_config_from_hf
from clara_jax.models.decoder import Decoder
from experiments.small_world.base_data import Mix, TextBatch, draw_chats, mark_answers, pad_chats
from experiments.small_world.world import World

Params = dict[str, Any]


def base_config(vocab_size: int, eos: int, bos: int, pad: int, tied: bool) -> dict[str, Any]:
    """config.json of the tiny base: Qwen3's architecture, 4 layers of width 96.

    Heads are as wide as those of large models, for in a rotation half of a narrow head's dimensions tell places, and
    what is left must tell some 170 words of names apart.
    """
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocab_size,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": tied,
        "use_sliding_window": False,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "torch_dtype": "float32",
    }


def make_decoder(config: dict[str, Any], dtype: Any = jnp.float32) -> Decoder:
    """The decoder of that config; in bfloat16 with NVIDIA's attention."""
    return Decoder(decoder_config_from_hf(config), dtype=dtype, attention="cudnn" if dtype == jnp.bfloat16 else "xla")


def init_params(decoder: Decoder, seed: int) -> Params:
    """Random parameters at the scale that suits a narrow model.

    `Decoder.init_base` draws with a spread of 0.02, right for a width of thousands. Here kernels get
    1 / sqrt(inputs), those that write to the residual stream less by the root of how many there are, and
    embeddings a spread of 1.
    """

    def rescale(path: tuple[Any, ...], leaf: Array) -> Array:
        names = [key.key for key in path]
        if names[-1] == "embed":
            return leaf / 0.02
        if names[-1] == "kernel":
            spread = 1 / math.sqrt(leaf.shape[-2])
            if names[-2] in ("o_proj", "down_proj"):
                spread /= math.sqrt(2 * decoder.config.num_layers)
            return leaf / 0.02 * spread
        return leaf

    return jax.tree_util.tree_map_with_path(rescale, decoder.init_base(jax.random.key(seed)))


def tie_head(params: Params) -> Params:
    """The parameters without their head, to be trained on with the embedding in its place.

    The last norm is lowered, since an embedding's entries are that much larger than the head's.
    """
    kept = {name: value for name, value in params.items() if name != "head"}
    return {**kept, "final_norm": 0.25 * params["final_norm"]}


def scale_stream(params: Params, factor: float) -> Params:
    """The same model with everything in its residual stream `factor` times as large.

    Layers norm what they read, so all that changes is how large an embedding is beside a memory, which is a normed
    state: the last norm is divided by `factor`, for the logits to stay. In large models a memory is the larger of the
    two: embeddings begin with a spread of 0.02, and the last norm gives about 1.
    """

    def scale(path: tuple[Any, ...], leaf: Array) -> Array:
        names = {key.key for key in path}
        return leaf * factor if names & {"embed", "o_proj", "down_proj"} else leaf

    scaled = jax.tree_util.tree_map_with_path(scale, params)
    return {**scaled, "final_norm": params["final_norm"] / factor}


def make_optimizer(params: Params) -> optax.GradientTransformation:
    """Muon for the stacked kernels and Adam for the rest, at a rate of 1, which `train_step` multiplies."""
    stacked = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    dimensions = jax.tree_util.tree_map_with_path(lambda path, _: stacked if path[-1].key == "kernel" else None, params)
    muon = optax.contrib.muon(1.0, consistent_rms=0.2, muon_weight_dimension_numbers=dimensions)
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


@functools.partial(jax.jit, static_argnames=("decoder", "optimizer"), donate_argnames=("params", "state"))
def train_step(
    decoder: Decoder,
    optimizer: optax.GradientTransformation,
    params: Params,
    state: Any,
    batch: tuple[Array, ...],
    learning_rate: Array,
) -> tuple[Params, Any, Array]:
    """One update of all parameters: `(params, state, loss)`."""
    loss, gradients = jax.value_and_grad(_loss, argnums=1)(decoder, params, batch)
    updates, state = optimizer.update(gradients, state, params)
    params = optax.apply_updates(params, jax.tree.map(lambda x: learning_rate * x, updates))
    return params, state, loss


def as_arrays(batch: TextBatch, most: int) -> tuple[np.ndarray, ...]:
    """Tokens, valid, and the columns of up to `most` answer tokens a row with their weights."""
    counts = batch.targets.sum(axis=1)
    if counts.max() > most:
        raise ValueError(f"{counts.max()} answer tokens in a row, room for {most}")
    columns = np.argsort(~batch.targets, axis=1, kind="stable")[:, :most]
    return batch.tokens, batch.valid, columns, np.arange(columns.shape[1]) < counts[:, None]


def _loss(decoder: Decoder, params: Params, arrays: tuple[Array, ...]) -> Array:
    tokens, valid, columns, weights = arrays
    logits = _target_logits(decoder, params, tokens, valid, columns)
    targets = jnp.take_along_axis(tokens, columns, axis=1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(losses * weights) / jnp.maximum(weights.sum(), 1)


def _target_logits(decoder: Decoder, params: Params, tokens: Array, valid: Array, columns: Array) -> Array:
    embeddings = decoder.apply({"params": params}, tokens, method="embed")
    hidden, _ = decoder.apply({"params": params}, embeddings, valid)
    before = jnp.maximum(columns - 1, 0)
    at_targets = jnp.take_along_axis(hidden, before[:, :, None], axis=1)
    return decoder.apply({"params": params}, at_targets, method="logits")


@functools.partial(jax.jit, static_argnames=("decoder",))
def _rows_right(decoder: Decoder, params: Params, arrays: tuple[Array, ...]) -> Array:
    tokens, valid, columns, weights = arrays
    logits = _target_logits(decoder, params, tokens, valid, columns)
    return jnp.all((logits.argmax(axis=-1) == jnp.take_along_axis(tokens, columns, axis=1)) | ~weights, axis=1)


def exact_match(
    decoder: Decoder, params: Params, tokenizer: ClaraTokenizer, world: World, mix: Mix, count: int = 512
) -> float:
    """Share of single questions whose greedy answer is exactly right, end token included.

    Greedy generation writes the right answer if and only if each of its tokens is the best choice after the
    right ones before it, so that one pass over the answers decides it.
    """
    rng = random.Random("exact match")
    chats = draw_chats(world, mix, count, tokenizer, rng)
    right = []
    for start in range(0, count, 128):
        batch = mark_answers(pad_chats(chats[start : start + 128], tokenizer, 240), tokenizer)
        right.append(_rows_right(decoder, params, as_arrays(batch, 8)))
    return float(np.concatenate(right).mean())


def save_model(folder: Path, params: Params, config: dict[str, Any]) -> None:
    """Weights, config.json and generation_config.json, as transformers reads them."""
    save_base(folder, params, decoder_config_from_hf(config))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = json.dumps({**generation, "do_sample": False}, indent=2) + "\n"
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
