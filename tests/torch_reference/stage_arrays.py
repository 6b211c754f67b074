"""Arrays and facts of one stage file, from its texts and a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checkpoint import load
from .inputs import Batch, encoder_batch, labelled_batch
from .model import ClaraReference
from .stages import (
    StageBatch,
    StageOutput,
    collate,
    forward,
    generator_pass,
    positive_mask,
)
from .training import gradient_norm, optimizer_summary, prepare, train_steps

Arrays = dict[str, np.ndarray]

STAGE_FILES = [
    "stage1_qa",
    "stage1_paraphrase",
    "stage1_mixed",
    "stage1_qa_truncated",
    "stage1_2",
    "stage2",
    "stage2_pretrain_retrieval",
]
WITHOUT_TRAINING = ("stage1_mixed", "stage1_qa_truncated")


def to_numpy(value: Any) -> np.ndarray:
    """int32, bool or float32 copy of a tensor or number."""
    array = value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.dtype == bool:
        return array.copy()
    return array.astype(np.int32 if array.dtype.kind in "iu" else np.float32)


def input_arrays(encoder: Batch, generator: Batch, query: Batch | None = None) -> Arrays:
    """Token arrays under their recorded names."""
    tensors = {"enc_input_ids": encoder.ids, "enc_attention_mask": encoder.mask}
    if query is not None:
        tensors |= {"query_input_ids": query.ids, "query_attention_mask": query.mask}
    tensors |= {"dec_input_ids": generator.ids, "dec_attention_mask": generator.mask, "labels": generator.labels}
    return {name: to_numpy(tensor) for name, tensor in tensors.items()}


def forward_arrays(batch: StageBatch, out: StageOutput, n_logits: int, n_hidden: int) -> Arrays:
    """Losses and intermediates of one forward pass."""
    found: dict[str, Any] = {
        "loss": out.loss,
        "mse_loss": out.mse,
        "total_loss": out.total,
        "compressed": out.compressed.memory,
        "enc_last_hidden": (out.compressed.hidden * batch.encoder.mask[..., None])[:n_hidden],
    }
    if out.scores is not None:
        found |= {"query_reps": out.query_reps, "scores": out.scores, "topk_idx": out.topk_idx}
    if batch.stage == "stage2_pretrain_retrieval":
        found["pos_mask"] = positive_mask(batch.positives, out.scores.shape[1])
    elif out.scores is not None:
        found["topk_W"] = out.topk_w
    if out.logits is not None:
        found |= label_arrays(batch.generator, out, n_logits)
    return {name: to_numpy(value) for name, value in found.items()}


def label_arrays(generator: Batch, out: StageOutput, n_logits: int) -> dict[str, Any]:
    """Per-token losses and a selection of logits."""
    position = (generator.labels[:, 1:] != -100).nonzero()
    rows, steps = position[:, 0], position[:, 1]
    logits = out.logits[rows, steps]
    nll = torch.nn.functional.cross_entropy(logits, generator.labels[rows, steps + 1], reduction="none")
    chosen = np.linspace(0, len(position) - 1, min(n_logits, len(position))).round().astype(np.int32)
    return {
        "decoder_inputs_embeds": out.embeds * generator.mask[..., None],
        "label_pos": position,
        "label_nll": nll,
        "logits_sel": chosen,
        "logits": logits[torch.from_numpy(chosen).long()],
    }


def adapter_arrays(model: ClaraReference, prefix: str, value: str) -> Arrays:
    """``grad`` or ``data`` of every adapter tensor that has a gradient."""
    return {
        f"{prefix}::{adapter}::{name}": to_numpy(getattr(parameter, value))
        for adapter in sorted(model.adapters)
        for name, parameter in model.parameters_of(adapter).items()
        if parameter.grad is not None
    }


def gradient_arrays(model: ClaraReference, batch: StageBatch, out: StageOutput, parameters: list) -> Arrays:
    """Gradients of the total loss."""
    rows = model.tokenizer.ids.mem
    out.total.backward()
    found = adapter_arrays(model, "grad", "grad")
    found["grad_norm"] = to_numpy(gradient_norm(parameters))
    if batch.stage == "stage2":
        found["grad_scores"] = to_numpy(out.scores.grad)
    if batch.stage == "stage1":
        found["grad_embed_mem_rows"] = to_numpy(model.embedding.grad[rows])
        return found
    model.embedding.requires_grad_(True)
    (table,) = torch.autograd.grad(forward(model, batch).total, model.embedding)
    model.embedding.requires_grad_(False)
    found["grad_embed_mem_rows_if_enabled"] = to_numpy(table[rows])
    return found


def training_arrays(model: ClaraReference, batch: StageBatch, parameters: list) -> Arrays:
    """Three optimizer steps on the same batch."""
    outputs, norms = train_steps(model, batch, parameters)
    found = {
        "train_loss": torch.stack([o.loss for o in outputs]),
        "train_mse": torch.stack([o.mse for o in outputs]),
        "train_total": torch.stack([o.total for o in outputs]),
        "train_grad_norm": torch.stack(norms),
    }
    if outputs[0].topk_idx is not None:
        found["train_topk_idx"] = torch.stack([o.topk_idx for o in outputs])
    if batch.stage == "stage1":
        found["trained_embed_mem_rows"] = model.embedding[model.tokenizer.ids.mem]
    return {name: to_numpy(value) for name, value in found.items()} | adapter_arrays(model, "trained", "data")


def stage_file(
    root: Path, name: str, record: dict[str, Any], n_logits: int, n_hidden: int
) -> tuple[Arrays, dict[str, Any]]:
    """Everything in ``name.npz`` and the facts in ``name.json``.

    ``n_logits`` labelled positions keep their logits and the first ``n_hidden``
    documents their hidden states.
    """
    model = load(root, record["checkpoint"])
    batch = collate(model, record)
    facts = describe_texts(model, batch.generator) | optimizer_summary(model, batch.stage)
    before = model.embedding.detach().clone()
    parameters = prepare(model, batch.stage)
    facts["n_optimizer_parameters"] = sum(p.numel() for p in parameters)
    out = forward(model, batch)
    arrays = input_arrays(batch.encoder, batch.generator, batch.query)
    arrays |= forward_arrays(batch, out, n_logits, n_hidden)
    arrays |= gradient_arrays(model, batch, out, parameters)
    grads = [n for n in arrays if n.startswith("grad::")]
    facts["adapters_receiving_gradient"] = sorted({n.split("::")[1] for n in grads})
    facts["adapters_with_nonzero_gradient"] = sorted({n.split("::")[1] for n in grads if arrays[n].any()})
    if batch.stage == "stage1":
        facts["embed_grad_max_abs_outside_mem_rows"] = outside(model, model.embedding.grad)
    if out.scores is not None:
        gaps = -out.scores.detach().sort(descending=True).values.diff()
        facts |= {"topk_temperature": 0.02, "smallest_gap_between_sorted_scores": float(gaps.min())}
    if name in WITHOUT_TRAINING:
        del facts["n_optimizer_parameters"]
        return arrays, facts
    arrays |= training_arrays(model, batch, parameters)
    changed = [f"{adapter} (LoRA)" for adapter in facts["adapters_receiving_gradient"]]
    if batch.stage == "stage1":
        facts["embed_change_max_abs_outside_mem_rows"] = outside(model, model.embedding.detach() - before)
        changed.insert(0, "decoder.model.embed_tokens.weight")
    facts["parameters_changed_by_training"] = changed
    return arrays, facts


def outside(model: ClaraReference, table: Tensor) -> float:
    """Largest entry outside the memory rows."""
    rest = table.clone()
    rest[model.tokenizer.ids.mem] = 0
    return float(rest.abs().max())


def describe_texts(model: ClaraReference, generator: Batch) -> dict[str, list[str]]:
    """Decoded generator inputs and labels."""
    real = [row[mask.bool()].tolist() for row, mask in zip(generator.ids, generator.mask)]
    labels = [row[row != -100].tolist() for row in generator.labels]
    decode = model.tokenizer.decode
    return {
        "decoder_texts": [decode(ids, skip_special=False) for ids in real],
        "label_texts": [decode(ids, skip_special=False) for ids in labels],
    }


@torch.no_grad()
def reasoning_file(root: Path, record: dict[str, Any]) -> Arrays:
    """``stage2_reasoning_forward.npz``: rows with different document counts."""
    model = load(root, record["checkpoint"])
    tokenizer = model.tokenizer
    encoder = encoder_batch(tokenizer, record["documents"], model.settings["doc_max_length"])
    lengths = record["prompt_lengths"]
    generator = labelled_batch(tokenizer, record["prompts"], lengths, max_length=10**6)
    compressed = model.compress(encoder)
    loss, _, _ = generator_pass(model, generator, compressed.memory, record["docs_num"])
    found = {"loss": loss, "mse_loss": compressed.mse, "compressed": compressed.memory}
    found["docs_num"] = torch.tensor(record["docs_num"])
    return {name: to_numpy(value) for name, value in found.items()} | input_arrays(encoder, generator)
