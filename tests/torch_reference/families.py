"""Base model folders of the recorded cases."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from . import small_tokenizers as st

_COMMON = {
    "hidden_act": "silu",
    "hidden_size": 24,
    "initializer_range": 0.2,
    "num_hidden_layers": 2,
    "use_cache": True,
}


@dataclass(frozen=True)
class Family:
    """How a case's base folder is made and how the case is configured.

    A list of stop tokens holds an ordinary token too, so that some rows end early.
    """

    seed: int
    config: dict[str, Any]
    case: dict[str, int]
    make_tokenizer: Callable[[list[str], Path], None]
    stop: int | list[int]
    shards: int = 1
    style: str = "4.56"
    layer_scale: float = 0.2


def _qwen2(lines: list[str], folder: Path) -> None:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    names = {"additional_special_tokens": special[1:], "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = st.byte_level(lines, 330, special)
    st.save_folder(tokenizer, folder, st.CHATML, names, "Qwen2Tokenizer", template_inside=False)


def _mistral(lines: list[str], folder: Path) -> None:
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    st.save_folder_v5(st.sentencepiece_like(lines, 400, legacy=False), folder, st.MERGE_SYSTEM, names)


def _llama(lines: list[str], folder: Path) -> None:
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    tokenizer = st.sentencepiece_like(lines, 400, legacy=True)
    st.save_folder(tokenizer, folder, st.REJECT_SYSTEM, names, "LlamaTokenizer", template_inside=True)


def _phi3(lines: list[str], folder: Path) -> None:
    special = ["<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    names = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    tokenizer = st.byte_level(lines, 330, special)
    st.save_folder(tokenizer, folder, st.PHI, names, "PreTrainedTokenizerFast", template_inside=True)


FAMILIES = {
    "qwen2_bias": Family(
        seed=111,
        config=_COMMON
        | {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 330,
            "eos_token_id": 332,
            "intermediate_size": 40,
            "max_position_embeddings": 4096,
            "max_window_layers": 2,
            "model_type": "qwen2",
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "vocab_size": 360,
        },
        case={"doc_max_length": 48, "compress_rate": 16, "lora_r": 2, "top_k": 3, "n_docs": 6},
        make_tokenizer=_qwen2,
        stop=[332, 330, 125],
    ),
    "mistral_window": Family(
        seed=22,
        config=_COMMON
        | {
            "architectures": ["MistralForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": 8,
            "intermediate_size": 36,
            "max_position_embeddings": 4096,
            "model_type": "mistral",
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-05,
            "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
            "sliding_window": 24,
            "tie_word_embeddings": False,
            "vocab_size": 400,
        },
        case={"doc_max_length": 40, "compress_rate": 10, "lora_r": 2, "top_k": 2, "n_docs": 4},
        make_tokenizer=_mistral,
        stop=2,
        shards=2,
        style="5",
    ),
    "llama2_linear": Family(
        seed=35,
        config=_COMMON
        | {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "intermediate_size": 36,
            "max_position_embeddings": 4096,
            "mlp_bias": True,
            "model_type": "llama",
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {"factor": 2.0, "type": "linear"},
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "vocab_size": 400,
        },
        case={"doc_max_length": 36, "compress_rate": 12, "lora_r": 2, "top_k": 2, "n_docs": 5},
        make_tokenizer=_llama,
        stop=2,
        layer_scale=0.35,  # a tied head otherwise repeats its last input for ever
    ),
    "phi3_default": Family(
        seed=144,
        config=_COMMON
        | {
            "architectures": ["Phi3ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 330,
            "embd_pdrop": 0.0,
            "eos_token_id": 331,
            "intermediate_size": 36,
            "max_position_embeddings": 4096,
            "model_type": "phi3",
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "original_max_position_embeddings": 4096,
            "pad_token_id": 331,
            "resid_pdrop": 0.0,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "vocab_size": 340,
        },
        case={"doc_max_length": 40, "compress_rate": 20, "lora_r": 4, "top_k": 1, "n_docs": 4},
        make_tokenizer=_phi3,
        stop=[331, 335, 293],
        style="4.40",
    ),
}


def random_like(name: str, tensor: Tensor, rng: torch.Generator, layer_scale: float) -> Tensor:
    """Random values in which every kind of term is present."""
    noise = torch.randn(tensor.shape, generator=rng)
    if "norm" in name:
        return 1 + 0.25 * noise
    if name.endswith("bias"):
        return (0.3 if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")) else 0.06) * noise
    return (layer_scale if ".layers." in name else 0.2) * noise


def make_base(family: Family, folder: Path, lines: list[str]) -> None:
    """Write tokenizer, configuration and weights of a base model."""
    family.make_tokenizer(lines, folder)
    config = dict(family.config)
    if family.style != "4.40":
        config["dtype"] = "float32"
    config["transformers_version"] = {"4.56": "4.56.2", "4.40": "4.40.2"}.get(family.style, "5.24.0")
    st.write_json(folder / "config.json", dict(sorted(config.items())))
    loaded = AutoConfig.from_pretrained(folder)
    if family.style == "5":
        loaded.save_pretrained(folder)
    model = AutoModelForCausalLM.from_config(loaded)
    rng = torch.Generator().manual_seed(family.seed)
    weights = {name: random_like(name, t, rng, family.layer_scale) for name, t in model.state_dict().items()}
    if family.config["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    save_weights(weights, folder, family.shards)
    generation = {"bos_token_id": family.config["bos_token_id"], "eos_token_id": family.stop}
    st.write_json(folder / "generation_config.json", {"_from_model_config": True} | generation)


def save_part(weights: dict[str, Tensor], path: Path) -> None:
    """One safetensors file that others may read."""
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)


def save_weights(weights: dict[str, Tensor], folder: Path, shards: int) -> None:
    """One safetensors file, or several with an index."""
    if shards == 1:
        save_part(weights, folder / "model.safetensors")
        return
    where, names = {}, sorted(weights)
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        save_part({name: weights[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    size = sum(t.numel() * t.element_size() for t in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
