"""A run directory as a model: what training starts from, what it leaves behind, and what it may be resumed with."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from clara_jax import pretrained
from clara_jax.config import TrainConfig, load_config
from clara_jax.errors import fail
from clara_jax.interop.clara_checkpoint import ADAPTERS
from clara_jax.models.attention import AttentionName, check_attention
from clara_jax.models.lora import LoraConfig
from clara_jax.pretrained import Pretrained, with_query_reasoner
from clara_jax.training.checkpoint import BASE, CHECKPOINTS, complete_steps, restore_adapters
from clara_jax.training.stages import STAGES, check_trainable

CONFIG = "config.yaml"
# What may differ when a run goes on: where and how it runs, and how it is watched, not what it computes.
FREE_KEYS = (
    "run_dir",
    "steps",
    "epochs",
    "evaluation",
    "mesh",
    "cluster",
    "micro_batches",
    "resume",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_best",
    "profile",
    "compilation_cache",
    "model.base",  # its fingerprint is compared instead
    "model.remat",
    "model.attention",
    "data.path",  # likewise
    "data.stores",
    "data.workers",
    "data.cache_dir",
)


def starting_model(config: TrainConfig, mesh: Mesh | None = None) -> Pretrained:
    """The model that a run starts from: new adapters, or those of `model.start_from`.

    It has a query reasoner if the stage reads questions.
    """
    settings = config.model
    dtype = None if settings.dtype == "auto" else settings.dtype
    if settings.start_from is None:
        model = _new_model(config, mesh, dtype)
    else:
        found = load_model(Path(settings.start_from), settings.base, dtype, mesh)
        _require_same_shape(config, found)
        decoder = dataclasses.replace(found.model.decoder, remat=settings.remat, lora_dropout=config.lora.dropout)
        model = dataclasses.replace(found, model=dataclasses.replace(found.model, decoder=decoder))
    if settings.start_fresh:
        check_trainable("model.start_fresh", settings.start_fresh)
        fresh = with_query_reasoner(_new_model(config, mesh, dtype).params)
        model.params.update({name: fresh[name] for name in settings.start_fresh})
    model = _with_attention(model, settings.attention)
    if STAGES[config.stage].samples != "retrieval":
        return model
    return dataclasses.replace(model, params=with_query_reasoner(model.params))


def _with_attention(model: Pretrained, name: AttentionName) -> Pretrained:
    decoder = model.model.decoder
    check_attention(name, decoder.config, jnp.dtype(decoder.dtype).name, jax.default_backend())
    roles = dataclasses.replace(model.model, decoder=dataclasses.replace(decoder, attention=name))
    return dataclasses.replace(model, model=roles)


def load_model(folder: Path, base: str | None = None, dtype: str | None = None, mesh: Mesh | None = None) -> Pretrained:
    """The model of a run directory (its latest checkpoint), of its `checkpoints/STEP`, or of a CLaRa checkpoint.

    The latter is one in the reference's format. A curriculum's directory stands for its last stage that has a
    checkpoint. `base` overrides the base model that the folder names.
    """
    if (folder / ADAPTERS).exists():
        return pretrained.load_checkpoint(folder, base, dtype, mesh=mesh)
    step = None
    if folder.parent.name == CHECKPOINTS and folder.name.isdigit():
        folder, step = folder.parent.parent, int(folder.name)
    if not (folder / CONFIG).exists():
        stage = _last_stage(folder)
        if stage is None:
            fail(
                f"{folder} is neither a run directory (no {CONFIG}) nor a CLaRa checkpoint (no {ADAPTERS}) nor that of "
                "a curriculum (no N_STAGE with a checkpoint)",
                "Name a folder that clara_jax.train or the reference has written",
            )
        folder = stage
    config = load_config(folder / CONFIG)
    adapters = restore_adapters(folder, step)
    home = json.loads((folder / BASE).read_text(encoding="utf-8"))["folder"]
    without_dropout = dataclasses.replace(config, lora=dataclasses.replace(config.lora, dropout=0.0))
    model = _new_model(without_dropout, mesh, dtype, base or home)
    pretrained.set_special_rows(model.params, adapters.pop("special_rows"), model.tokenizer.special)
    model.params.update(jax.tree.map(jnp.asarray, adapters))
    return model


def _last_stage(folder: Path) -> Path | None:
    """The run directory `folder/N_STAGE` of the highest N that has a checkpoint; the latest of those with that N."""
    found = []
    for checkpoints in folder.glob(f"*_*/{CHECKPOINTS}"):
        number, _, stage = checkpoints.parent.name.partition("_")
        if number.isdigit() and stage in STAGES and complete_steps(checkpoints.parent):
            found.append((int(number), checkpoints.stat().st_mtime, checkpoints.parent))
    return max(found)[2] if found else None


def check_resumable(config: TrainConfig, run_dir: Path) -> None:
    """Refuse to go on with a run under a configuration that computes something else."""
    if not (run_dir / CONFIG).exists():
        return
    before, now = _flat(load_config(run_dir / CONFIG)), _flat(config)
    for key, value in now.items():
        if key.startswith(FREE_KEYS) or before[key] == value:
            continue
        fail(
            f"{key} is {value!r}, and {run_dir} was trained with {before[key]!r}",
            "Give the same value to go on, or name another run_dir",
        )


def _flat(config: TrainConfig) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in dataclasses.asdict(config).items():
        nested = isinstance(value, dict)
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if nested else {name: value}
    return flat


def _new_model(config: TrainConfig, mesh: Mesh | None, dtype: str | None, base: str | None = None) -> Pretrained:
    return pretrained.new_model(
        base or config.model.base,
        config.model.doc_max_length,
        config.model.compression_rate,
        config.lora,
        config.seed,
        dtype,
        config.model.remat,
        config.objective.top_k,
        mesh=mesh,
        memory_token_spread=config.model.memory_token_spread,
    )


def _require_same_shape(config: TrainConfig, found: Pretrained) -> None:
    asked = (config.model.doc_max_length, config.model.compression_rate, config.lora)
    has = (
        found.checkpoint.doc_max_length,
        found.checkpoint.compression_rate,
        LoraConfig(found.checkpoint.lora_rank, found.model.decoder.lora_alpha, config.lora.dropout),
    )
    names = ("model.doc_max_length", "model.compression_rate", "lora")
    for name, ours, theirs in zip(names, asked, has, strict=True):
        if ours != theirs:
            fail(
                f"{name} is {ours}, but {config.model.start_from} was trained with {theirs}",
                f"Set {name} to the latter, or start from another model",
            )
