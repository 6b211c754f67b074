"""Base model with adapters, and the computations every stage is made of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from .inputs import Batch
from .lora import (
    DECODER,
    ENCODER,
    QUERY,
    LoraLinear,
    adapter_parameters,
    wrap_linear_layers,
)
from .tokens import ClaraTokenizer


@dataclass(frozen=True)
class Compressed:
    """Result of the compressor on a batch of documents."""

    memory: Tensor
    mse: Tensor
    hidden: Tensor


class ClaraReference(nn.Module):
    """One causal language model used as compressor, query encoder and generator."""

    def __init__(self, root: Path, settings: dict[str, Any]) -> None:
        super().__init__()
        self.settings = settings
        folder = root / settings["decoder_model_name"]
        n_mem = settings["doc_max_length"] // settings["compr_rate"]
        self.tokenizer = ClaraTokenizer(folder, settings["decoder_model_name"], n_mem)
        decoder = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        decoder.resize_token_embeddings(self.tokenizer.ids.length, mean_resizing=False)
        self.decoder = decoder.eval().requires_grad_(False)
        self.layers: list[LoraLinear] = wrap_linear_layers(self.decoder)
        self.adapters: list[str] = []
        generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        stop = generation["eos_token_id"]
        self.stop_ids: list[int] = stop if isinstance(stop, list) else [stop]

    # -- parameters ---------------------------------------------------------

    @property
    def embedding(self) -> nn.Parameter:
        """The (resized) input embedding table."""
        return self.decoder.get_input_embeddings().weight

    @property
    def head(self) -> nn.Parameter:
        """The output head, which is the embedding table in tied models."""
        return self.decoder.get_output_embeddings().weight

    def add_adapter(self, adapter: str) -> None:
        """Create a new adapter on every wrapped layer."""
        for layer in self.layers:
            layer.add(adapter, self.settings["lora_r"])
        self.adapters.append(adapter)

    def parameters_of(self, adapter: str) -> dict[str, nn.Parameter]:
        """Parameters of one adapter under their checkpoint names."""
        return adapter_parameters(self.decoder, adapter)

    def set_trainable(self, adapters: list[str], memory_rows: bool = False) -> None:
        """Choose what receives gradient; only memory rows of the table ever do."""
        self.requires_grad_(False)
        for adapter in adapters:
            for parameter in self.parameters_of(adapter).values():
                parameter.requires_grad_(True)
        if memory_rows:
            self.embedding.requires_grad_(True)
            self.embedding.register_hook(self._keep_memory_rows)

    def _keep_memory_rows(self, gradient: Tensor) -> Tensor:
        kept = torch.zeros_like(gradient)
        rows = self.tokenizer.ids.mem
        kept[rows] = gradient[rows]
        return kept

    def activate(self, adapter: str) -> None:
        """Use ``adapter`` in the following forward passes."""
        for layer in self.layers:
            layer.active = adapter

    # -- computations -------------------------------------------------------

    def _memory_states(self, batch: Batch, adapter: str) -> tuple[Tensor, Tensor, Tensor]:
        self.activate(adapter)
        hidden = self.decoder.model(
            input_ids=batch.ids, attention_mask=batch.mask.float(), use_cache=False
        ).last_hidden_state
        is_memory = torch.isin(batch.ids, torch.tensor(self.tokenizer.ids.mem))
        rows, n_mem = len(batch.ids), len(self.tokenizer.ids.mem)
        return hidden[is_memory].reshape(rows, n_mem, -1), hidden, is_memory

    def compress(self, batch: Batch) -> Compressed:
        """Memory states of documents and the distance between the two means."""
        memory, hidden, is_memory = self._memory_states(batch, ENCODER)
        is_text = (batch.mask.bool() & ~is_memory)[..., None].float()
        text_mean = (hidden * is_text).sum(1) / is_text.sum(1)
        mse = F.mse_loss(text_mean, memory.mean(1))
        return Compressed(memory, mse, hidden)

    def encode_queries(self, batch: Batch) -> Tensor:
        """Flattened memory states of questions under the query adapter."""
        return self._memory_states(batch, QUERY)[0].flatten(1)

    def fill_slots(self, ids: Tensor, memory: Tensor, docs_per_row: list[int]) -> Tensor:
        """Generator embeddings with document memories written over placeholders."""
        embeds = self.decoder.get_input_embeddings()(ids)
        n_mem = memory.shape[1]
        filled, used = [], 0
        for row, count in enumerate(docs_per_row):
            first = int((ids[row] == self.tokenizer.ids.mem[0]).int().argmax())
            pieces, end = [], 0
            for j in range(count):
                start = first + j * (n_mem + 1)
                pieces += [embeds[row, end:start], memory[used + j]]
                end = start + n_mem
            used += count
            filled.append(torch.cat([*pieces, embeds[row, end:]]))
        return torch.stack(filled)

    def generator_logits(self, embeds: Tensor, mask: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Logits of the generator for given embeddings."""
        self.activate(DECODER)
        return self.decoder(
            inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids, use_cache=False
        ).logits.float()

    @staticmethod
    def generator_loss(logits: Tensor, labels: Tensor) -> Tensor:
        """Shifted cross entropy, mean over every labelled token of the batch."""
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
