"""One random CLaRa model: a base in PyTorch, its files, and a checkpoint in the reference's format for both sides."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers

from clara_jax.data.tokenizer import ClaraTokenizer
from clara_jax.interop.clara_checkpoint import CheckpointConfig, write_checkpoint
from clara_jax.models.config import read_decoder_config
from clara_jax.models.lora import LoraConfig, adapter_shapes
from clara_jax.models.roles import ROLES
from experiments.compression.models import DOC_MAX_LENGTH, RATE, Shape, train_tokenizer

LORA = LoraConfig(rank=16, alpha=32.0, dropout=0.1)
TOP_K = 5


@dataclasses.dataclass(frozen=True)
class Made:
    """The folders of base model and checkpoint, the base as transformers' model on its device, its embedding table."""

    base: Path
    checkpoint: Path
    torch_base: Any
    table: torch.Tensor


def make_model(folder: Path, texts: list[str], shape: Shape, dtype: str, device: str) -> Made:
    """A Mistral-shaped base of random weights, made on `device` and written once, and three random adapters.

    The adapters' B is not zero, so that leaving one out would show. The tokenizer is trained on `texts`.
    """
    base, checkpoint = folder / "base", folder / "checkpoint"
    train_tokenizer(texts, base)
    config = transformers.MistralConfig(
        vocab_size=len(ClaraTokenizer(base, DOC_MAX_LENGTH // RATE)),
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        sliding_window=None,
        initializer_range=0.9 * shape.hidden**-0.5,
    )
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
    model.save_pretrained(base)
    decoder_config = read_decoder_config(base)
    rng = np.random.default_rng(0)
    shapes = adapter_shapes(decoder_config, LORA.rank)
    adapters = {
        role: jax.tree.map(lambda leaf: (0.03 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes)
        for role in ROLES
    }
    tables = [layer.weight.detach().float().cpu().numpy() for layer in (model.get_input_embeddings(), model.lm_head)]
    settings = CheckpointConfig(str(base), DOC_MAX_LENGTH, RATE, LORA.rank, TOP_K)
    write_checkpoint(checkpoint, settings, decoder_config, adapters, tables[0], tables[1])
    return Made(base, checkpoint, model, model.get_input_embeddings().weight.detach().cpu().clone())
