"""Where each leaf of this project's trees lies in Hugging Face's names, and how it lies there.

A Hugging Face weight is [out, in]; a kernel or adapter factor here is [in, out]. Layers are separate tensors
there and stacked here. Phi-3 keeps q, k, v and gate, up in one matrix each.
"""

from clara_jax.models.config import DecoderConfig

EMBED, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
# Buffers that old checkpoints carry and no model reads.
IGNORED_SUFFIX = ".rotary_emb.inv_freq"

_NORMS = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}


def site_name(layer: int, site: str) -> str:
    """Hugging Face module of a linear layer: `model.layers.3.self_attn.q_proj`."""
    block = "mlp" if site in ("gate_proj", "up_proj", "gate_up_proj", "down_proj") else "self_attn"
    return f"model.layers.{layer}.{block}.{site}"


def norm_name(layer: int, norm: str) -> str:
    """Hugging Face weight of one of a block's norms."""
    return f"model.layers.{layer}.{_NORMS[norm]}.weight"


def block_norms(config: DecoderConfig) -> tuple[str, ...]:
    """The norms of a block, by their names here."""
    return tuple(_NORMS)[: 4 if config.qk_norm else 2]
