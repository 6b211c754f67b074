"""Shapes of models that can be planned for, or run with random weights, without a download.

The fields are those of the models' public `config.json`, without the stretch factors of rotary embeddings, which change
neither sizes nor times (ones stand for them).
"""

from pathlib import Path
from typing import Any

from clara_jax.errors import fail
from clara_jax.models.config import DecoderConfig, decoder_config_from_hf, read_decoder_config

_MISTRAL_7B: dict[str, Any] = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
}
_PHI_4_MINI: dict[str, Any] = {
    "model_type": "phi3",
    "vocab_size": 200064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48},
    "sliding_window": 262144,
    "tie_word_embeddings": True,
}
_QWEN3_4B: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
_LLAMA_3_8B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
KNOWN_MODELS: dict[str, dict[str, Any]] = {
    "mistralai/Mistral-7B-Instruct-v0.2": _MISTRAL_7B,
    "microsoft/Phi-4-mini-instruct": _PHI_4_MINI,
    "Qwen/Qwen3-4B": _QWEN3_4B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_3_8B,
}


def shape_of(base: str) -> DecoderConfig:
    """The shape of a base model: of a folder with a `config.json`, or one of `KNOWN_MODELS`.

    Raises `UserError` for any other.
    """
    folder = Path(base).expanduser()
    if (folder / "config.json").exists():
        return read_decoder_config(folder)
    if base in KNOWN_MODELS:
        return decoder_config_from_hf(KNOWN_MODELS[base])
    fail(
        f"model.base is {base}, which is neither a folder with a config.json nor a model whose shape is known",
        f"Give such a folder, or one of {', '.join(KNOWN_MODELS)}",
    )
