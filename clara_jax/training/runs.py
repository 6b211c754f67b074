"""A run directory as a model: what training starts from, and what it leaves behind."""

import dataclasses
import json
from pathlib import Path

from clara_jax import pretrained
from clara_jax.config import TrainConfig, load_config
from clara_jax.errors import fail
from clara_jax.interop.clara_checkpoint import ADAPTERS
from clara_jax.models.lora import LoraConfig
from clara_jax.pretrained import Pretrained
from clara_jax.training.checkpoint import BASE, restore_adapters

CONFIG = "config.yaml"


def starting_model(config: TrainConfig) -> Pretrained:
    """The model that a run starts from: new adapters, or those of `model.start_from`."""
    settings = config.model
    dtype = None if settings.dtype == "auto" else settings.dtype
    if settings.start_from is None:
        return pretrained.new_model(
            settings.base,
            settings.doc_max_length,
            settings.compression_rate,
            config.lora,
            config.seed,
            dtype,
            settings.remat,
            config.objective.top_k,
        )
    found = load_model(Path(settings.start_from), settings.base, dtype)
    _require_same_shape(config, found)
    decoder = dataclasses.replace(found.model.decoder, remat=settings.remat, lora_dropout=config.lora.dropout)
    return dataclasses.replace(found, model=dataclasses.replace(found.model, decoder=decoder))


def load_model(folder: Path, base: str | None = None, dtype: str | None = None) -> Pretrained:
    """The model of a run directory or of a CLaRa checkpoint in the reference's format.

    `base` overrides the base model that the folder names.
    """
    if (folder / ADAPTERS).exists():
        return pretrained.load_checkpoint(folder, base, dtype)
    if not (folder / CONFIG).exists():
        fail(
            f"{folder} is neither a run directory (no {CONFIG}) nor a CLaRa checkpoint (no {ADAPTERS})",
            "Name a folder that clara_jax.train or the reference has written",
        )
    config = load_config(folder / CONFIG)
    adapters = restore_adapters(folder)
    home = json.loads((folder / BASE).read_text(encoding="utf-8"))["folder"]
    lora = dataclasses.replace(config.lora, dropout=0.0)
    model = pretrained.new_model(
        base or home,
        config.model.doc_max_length,
        config.model.compression_rate,
        lora,
        config.seed,
        dtype,
        top_k=config.objective.top_k,
    )
    pretrained.set_special_rows(model.params, adapters.pop("special_rows"), model.tokenizer.special)
    model.params.update(adapters)
    return model


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
