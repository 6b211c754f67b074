"""The decoder's configuration, and how each Hugging Face family states it."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from clara_jax.checked_json import number, positive_int, read_object
from clara_jax.errors import UserError, fail

FAMILIES = ("mistral", "llama", "qwen2", "qwen3", "phi3")
RopeType = Literal["default", "linear", "dynamic", "llama3", "longrope"]


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding: the base frequencies and how a family stretches them.

    `factor` belongs to linear, dynamic and llama3; `low_freq_factor` and `high_freq_factor` to llama3;
    `short_factors`, `long_factors` and `attention_factor` to longrope; `original_length` (tokens) to
    dynamic, llama3 and longrope.
    """

    theta: float = 10_000.0
    rotary_dim: int = 128
    type: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of one decoder-only language model. Lengths are in tokens, sizes in elements.

    `windows[layer]` is that layer's sliding attention window, 0 for full attention. `fused_projections`
    says that the checkpoint family keeps q, k, v (and gate, up) in one matrix, so that their adapters
    share one A matrix (Phi-3); the frozen weights themselves are always kept apart.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope
    rms_norm_eps: float = 1e-6
    tied_head: bool = False
    biased: tuple[str, ...] = ()
    qk_norm: bool = False
    fused_projections: bool = False
    windows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            fail(
                f"num_attention_heads {self.num_heads} is not a multiple of num_key_value_heads {self.num_kv_heads}",
                "Correct the model's config.json",
            )
        if self.windows and len(self.windows) != self.num_layers:
            fail(
                f"{len(self.windows)} attention windows for {self.num_layers} layers",
                "Give one window per layer",
            )

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Name of every linear layer of a block -> (input size, output size)."""
        hidden, mlp = self.hidden_size, self.intermediate_size
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (hidden, query),
            "k_proj": (hidden, key),
            "v_proj": (hidden, key),
            "o_proj": (query, hidden),
            "gate_proj": (hidden, mlp),
            "up_proj": (hidden, mlp),
            "down_proj": (mlp, hidden),
        }

    @property
    def adapter_sites(self) -> dict[str, tuple[str, ...]]:
        """Name of every low-rank adapter of a block -> the projections whose outputs it updates, in order."""
        if self.fused_projections:
            return {
                "qkv_proj": ("q_proj", "k_proj", "v_proj"),
                "o_proj": ("o_proj",),
                "gate_up_proj": ("gate_proj", "up_proj"),
                "down_proj": ("down_proj",),
            }
        return {name: (name,) for name in self.projections}


def read_decoder_config(folder: Path) -> DecoderConfig:
    """Read `config.json` of a Hugging Face model folder."""
    path = folder / "config.json"
    fields = read_object(path, "Point at a Hugging Face model folder (config.json, *.safetensors)")
    try:
        return decoder_config_from_hf(fields)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def decoder_config_from_hf(fields: dict[str, Any]) -> DecoderConfig:
    """Translate a Hugging Face `config.json` (4.x `rope_scaling` or 5.x `rope_parameters`).

    Raises `UserError` naming any feature this decoder does not compute; nothing is approximated.
    """
    family = fields.get("model_type")
    if family not in FAMILIES:
        fail(f"model family '{family}' is not supported", f"Use one of {', '.join(FAMILIES)}")
    _refuse_unsupported(family, fields)
    heads = positive_int(fields, "num_attention_heads")
    hidden = positive_int(fields, "hidden_size")
    given = {key: fields[key] for key in ("head_dim", "num_key_value_heads") if fields.get(key) is not None}
    if family == "qwen3" and "head_dim" not in given:
        fail("key 'head_dim' is missing", "Qwen3 states its head size; download config.json again")
    head_dim = positive_int({"head_dim": hidden // heads, **given}, "head_dim")
    return DecoderConfig(
        family=family,
        vocab_size=positive_int(fields, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=positive_int(fields, "intermediate_size"),
        num_layers=positive_int(fields, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=positive_int({"num_key_value_heads": heads, **given}, "num_key_value_heads"),
        head_dim=head_dim,
        rope=_rope_from_hf(fields, head_dim),
        rms_norm_eps=number(fields, "rms_norm_eps"),
        tied_head=bool(fields.get("tie_word_embeddings", False)),
        biased=_biased_projections(family, fields),
        qk_norm=family == "qwen3",
        fused_projections=family == "phi3",
        windows=_windows(family, fields),
    )


def _refuse_unsupported(family: str, fields: dict[str, Any]) -> None:
    # What a config may ask for, and the only values that this decoder computes.
    computed: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu",),
        "attention_dropout": (0, 0.0, None),
        "resid_pdrop": (0, 0.0, None),
        "embd_pdrop": (0, 0.0, None),
        "quantization_config": (None,),
        "attention_chunk_size": (None,),
        "num_local_experts": (None,),
        "logit_scale": (None, 1, 1.0),
        "final_logit_softcapping": (None,),
        "attn_logit_softcapping": (None,),
    }
    for key, values in computed.items():
        if key in fields and fields[key] not in values:
            fail(
                f"'{key}' is {fields[key]!r}, which the {family} decoder of clara_jax does not compute",
                f"Use a model whose '{key}' is {values[0]!r}",
            )


def _biased_projections(family: str, fields: dict[str, Any]) -> tuple[str, ...]:
    biased: tuple[str, ...] = ()
    if family == "qwen2":
        biased = ("q_proj", "k_proj", "v_proj")
    elif family in ("llama", "qwen3") and fields.get("attention_bias", False):
        biased = ("q_proj", "k_proj", "v_proj", "o_proj")
    if family == "llama" and fields.get("mlp_bias", False):
        biased += ("gate_proj", "up_proj", "down_proj")
    return biased


def _windows(family: str, fields: dict[str, Any]) -> tuple[int, ...]:
    layers = positive_int(fields, "num_hidden_layers")
    if family == "mistral" and "sliding_window" not in fields:
        fail("key 'sliding_window' is missing", "Write null for full attention; transformers would take 4096")
    if not fields.get("sliding_window") or family == "llama":
        return ()
    window = positive_int(fields, "sliding_window")
    if family in ("mistral", "phi3"):
        return (window,) * layers
    if not fields.get("use_sliding_window", False):
        return ()
    types = fields.get("layer_types") or [
        "sliding_attention" if layer >= fields.get("max_window_layers", 28) else "full_attention"
        for layer in range(layers)
    ]
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown:
        fail(
            f"'layer_types' holds {sorted(unknown)}",
            "Use a model of full_attention and sliding_attention layers",
        )
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


def _rope_from_hf(fields: dict[str, Any], head_dim: int) -> Rope:
    scaling = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        fail(f"the rotary scaling is {scaling!r}", "It must be an object or null")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    # transformers 5 keeps in rope_parameters what transformers 4 kept beside rope_scaling.
    both = {**fields, **scaling}
    partial = number(both, "partial_rotary_factor", 1.0)
    rope = Rope(theta=number(both, "rope_theta", 10_000.0), rotary_dim=int(head_dim * partial))
    if kind == "default":
        return rope
    if kind == "linear":
        return dataclasses.replace(rope, type="linear", factor=number(scaling, "factor"))
    if kind == "dynamic":
        length = positive_int(fields, "max_position_embeddings")
        return dataclasses.replace(rope, type="dynamic", factor=number(scaling, "factor"), original_length=length)
    if kind == "llama3":
        return dataclasses.replace(
            rope,
            type="llama3",
            factor=number(scaling, "factor"),
            low_freq_factor=number(scaling, "low_freq_factor"),
            high_freq_factor=number(scaling, "high_freq_factor"),
            original_length=positive_int(scaling, "original_max_position_embeddings"),
        )
    if kind in ("longrope", "su"):
        return _longrope(rope, fields, scaling)
    fail(
        f"rotary scaling '{kind}' is not supported",
        "Use default, linear, dynamic, llama3 or longrope",
    )


def _longrope(rope: Rope, fields: dict[str, Any], scaling: dict[str, Any]) -> Rope:
    pairs = rope.rotary_dim // 2
    factors = {}
    for key in ("short_factor", "long_factor"):
        values = scaling.get(key)
        if not isinstance(values, list) or len(values) != pairs:
            found = f"{len(values)} entries" if isinstance(values, list) else repr(values)
            fail(f"longrope '{key}' has {found} for {pairs} rotary pairs", "Correct the model's config.json")
        factors[key] = tuple(number({key: value}, key) for value in values)
    longest = positive_int(fields, "max_position_embeddings")
    stated = {**scaling, **fields}.get("original_max_position_embeddings")
    original = (
        longest
        if stated is None
        else positive_int({"original_max_position_embeddings": stated}, "original_max_position_embeddings")
    )
    factor = number(scaling, "factor", 1.0) if stated is None else longest / original
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return dataclasses.replace(
        rope,
        type="longrope",
        original_length=original,
        short_factors=factors["short_factor"],
        long_factors=factors["long_factor"],
        attention_factor=number(scaling, "attention_factor", default),
    )
