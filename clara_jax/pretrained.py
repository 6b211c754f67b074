"""A whole model from a folder: base weights, tokenizer, adapters and memory tokens."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from clara_jax.checked_json import read_object
from clara_jax.data.tokenizer import ClaraTokenizer, SpecialTokens
from clara_jax.errors import fail
from clara_jax.interop import clara_checkpoint
from clara_jax.interop.base import Progress, load_base
from clara_jax.interop.clara_checkpoint import CheckpointConfig
from clara_jax.models.config import DecoderConfig, read_decoder_config
from clara_jax.models.decoder import Decoder
from clara_jax.models.lora import LoraConfig, init_adapter
from clara_jax.models.remat import RematPolicy
from clara_jax.models.roles import ROLES, AnyArray, Params, RoleModel
from clara_jax.sharding import base_sharding, check_heads, place

# transformers draws new vocabulary entries around the mean entry with this share of the old ones' spread.
REFERENCE_SPREAD = 1e-9**0.5


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model ready to train or to answer: the functional model, its parameters, its tokenizer.

    `stop_ids` end a generated text. `base_folder` holds the base model's files.
    """

    model: RoleModel
    params: Params
    tokenizer: ClaraTokenizer
    checkpoint: CheckpointConfig
    base_folder: Path
    stop_ids: tuple[int, ...]


def default_dtype(platform: str | None = None) -> str:
    """The compute type where none is named: float32 on the CPU, bfloat16 on an accelerator (by default jax's)."""
    return "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"


def load_checkpoint(
    folder: Path,
    base: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
) -> Pretrained:
    """Load a CLaRa checkpoint in the reference's format.

    `base` overrides the base model that the checkpoint names. On a `mesh` the base weights are divided.
    """
    checkpoint = clara_checkpoint.read_config(folder)
    lora = LoraConfig(checkpoint.lora_rank, 2.0 * checkpoint.lora_rank, dropout=0.0)
    found = resolve_base(base or checkpoint.base_model, beside=folder)
    tokenizer = ClaraTokenizer(found, checkpoint.num_memory)
    decoder_config = read_decoder_config(found)
    size = len(tokenizer)
    embed, head = clara_checkpoint.read_tables(folder, decoder_config, size)
    adapters = clara_checkpoint.read_adapters(folder, decoder_config, checkpoint.lora_rank)
    params = _base_params(found, decoder_config, dtype or default_dtype(), size, progress, mesh)
    base_tree = params["base"]
    for name, table in (("embed", embed), ("head", None if head is None else head.T)):
        if table is not None:
            base_tree[name] = place(table.astype(base_tree[name].dtype), base_tree[name].sharding)
    ids = tokenizer.special.memory_ids
    params["memory_tokens"] = jnp.asarray(embed[ids], jnp.float32)
    params.update(jax.tree.map(jnp.asarray, dict(adapters)))
    model = _role_model(decoder_config, tokenizer, lora, dtype or default_dtype(), "everything")
    return Pretrained(model, params, tokenizer, checkpoint, found, _stop_ids(found, tokenizer))


def new_model(
    base: str,
    doc_max_length: int,
    compression_rate: int,
    lora: LoraConfig,
    seed: int,
    dtype: str | None = None,
    remat: RematPolicy = "everything",
    top_k: int = 1,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
    memory_token_spread: float = REFERENCE_SPREAD,
) -> Pretrained:
    """A fresh model on a base: new compressor, generator and memory tokens, all drawn from `seed`.

    Memory tokens are drawn around the mean embedding with `memory_token_spread` times the spread of the base's.
    It has no query reasoner yet (see `with_query_reasoner`). On a `mesh` the base weights are divided.
    """
    found = resolve_base(base)
    tokenizer = ClaraTokenizer(found, doc_max_length // compression_rate)
    decoder_config = read_decoder_config(found)
    params = _base_params(found, decoder_config, dtype or default_dtype(), len(tokenizer), progress, mesh)
    compressor_rng, generator_rng, memory_rng = jax.random.split(jax.random.key(seed), 3)
    params["compressor"] = init_adapter(compressor_rng, decoder_config, lora.rank)
    params["generator"] = init_adapter(generator_rng, decoder_config, lora.rank)
    old = params["base"]["embed"][: min(decoder_config.vocab_size, tokenizer.special.first_memory)]
    old = old.astype(jnp.float32)
    noise = jax.random.normal(memory_rng, (tokenizer.special.num_memory, decoder_config.hidden_size))
    # The table may lie on several hosts, the noise lies on this one: as a NumPy array it can meet the table.
    params["memory_tokens"] = old.mean(axis=0) + memory_token_spread * old.std(axis=0) * np.asarray(noise)
    model = _role_model(decoder_config, tokenizer, lora, dtype or default_dtype(), remat)
    checkpoint = CheckpointConfig(base, doc_max_length, compression_rate, lora.rank, top_k)
    return Pretrained(model, params, tokenizer, checkpoint, found, _stop_ids(found, tokenizer))


def with_query_reasoner(params: Params) -> Params:
    """`params` with a query reasoner: its own, or, before it is ever trained, the compressor's copy (Sec. 3.3)."""
    return {"query_reasoner": params["compressor"], **params}


def special_rows(params: Params, special: SpecialTokens) -> dict[str, jax.Array]:
    """The rows of CLaRa's tokens in the frozen tables, which no base model file holds."""
    ids = slice(special.first_memory, special.sep + 1)
    rows = {"embed": params["base"]["embed"][ids]}
    return rows | ({"head": params["base"]["head"][:, ids]} if "head" in params["base"] else {})


def set_special_rows(params: Params, rows: dict[str, AnyArray], special: SpecialTokens) -> None:
    """Put `special_rows` back into the frozen tables."""
    base, ids = params["base"], slice(special.first_memory, special.sep + 1)
    base["embed"] = base["embed"].at[ids].set(rows["embed"])
    if "head" in rows:
        base["head"] = base["head"].at[:, ids].set(rows["head"])


def save_checkpoint(folder: Path, pretrained: Pretrained) -> None:
    """Write the reference's checkpoint format: adapters, and the tables with the trained memory tokens."""
    params, special = pretrained.params, pretrained.tokenizer.special
    embed = np.array(params["base"]["embed"])
    embed[special.memory_ids] = np.asarray(params["memory_tokens"]).astype(embed.dtype)
    head = None if "head" not in params["base"] else np.asarray(params["base"]["head"]).T
    config = pretrained.model.decoder.config
    adapters = {role: params[role] for role in ROLES if role in params}
    clara_checkpoint.write_checkpoint(folder, pretrained.checkpoint, config, adapters, embed, head)


def resolve_base(name: str, beside: Path | None = None) -> Path:
    """The local folder of a base model: a path, a path relative to a checkpoint's parents, or a hub id."""
    candidates = [Path(name).expanduser()]
    if beside is not None:
        candidates += [parent / name for parent in beside.absolute().parents[:2]]
    for folder in candidates:
        if (folder / "config.json").exists():
            return folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        tried = ", ".join(str(folder) for folder in candidates)
        fail(f"base model '{name}' is not a model folder (tried {tried})", "Give the folder, or a hub id")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # hub and network errors have no common class
        fail(
            f"base model '{name}' is neither a folder nor to be had from the hub ({type(error).__name__})",
            "Check the name, the network and your access token, or give a local folder",
        )


def _base_params(
    folder: Path, config: DecoderConfig, dtype: str, size: int, progress: Progress | None, mesh: Mesh | None
) -> Params:
    if mesh is None:
        return {"base": load_base(folder, config, jnp.dtype(dtype), size, progress)}
    check_heads(mesh, config.num_heads, config.num_kv_heads)
    sharding = functools.partial(base_sharding, mesh)
    return {"base": load_base(folder, config, jnp.dtype(dtype), size, progress, sharding)}


def _role_model(
    config: DecoderConfig, tokenizer: ClaraTokenizer, lora: LoraConfig, dtype: Any, remat: RematPolicy
) -> RoleModel:
    resized = dataclasses.replace(config, vocab_size=len(tokenizer))
    decoder = Decoder(resized, dtype=jnp.dtype(dtype), remat=remat, lora_alpha=lora.alpha, lora_dropout=lora.dropout)
    return RoleModel(decoder, tokenizer.special.first_memory)


def _stop_ids(folder: Path, tokenizer: ClaraTokenizer) -> tuple[int, ...]:
    """End-of-text ids as Hugging Face's generate takes them: generation config, then model config."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        fields = read_object(path, "Download the base model's files again") if path.exists() else {}
        ids = fields.get("eos_token_id")
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    return (tokenizer.special.eos,)
