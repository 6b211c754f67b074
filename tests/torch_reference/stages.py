"""Forward pass of every training stage."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import Batch, encoder_batch, generator_batch
from .lora import DECODER, ENCODER, QUERY
from .model import ClaraReference, Compressed
from .prompts import item_prompt
from .topk import straight_through_topk

TEMPERATURE = 0.02

OPTIMISED = {
    "stage1": [DECODER, ENCODER],
    "stage1_2": [DECODER, ENCODER],
    "stage2": [DECODER, ENCODER, QUERY],
    "stage2_pretrain_retrieval": [DECODER, ENCODER, QUERY],
}
WITH_GRADIENT = {
    "stage1": [DECODER, ENCODER],
    "stage1_2": [DECODER, ENCODER],
    "stage2": [DECODER, QUERY],
    "stage2_pretrain_retrieval": [QUERY],  # once the reference's adapter switch is repaired
}


@dataclass
class StageBatch:
    """Inputs of one micro batch."""

    stage: str
    rows: int
    encoder: Batch
    generator: Batch
    k: int
    query: Batch | None = None
    positives: list[list[int]] = field(default_factory=list)


@dataclass
class StageOutput:
    """Losses and the intermediates that recorded cases hold."""

    loss: Tensor
    mse: Tensor
    compressed: Compressed
    embeds: Tensor | None = None
    logits: Tensor | None = None
    query_reps: Tensor | None = None
    scores: Tensor | None = None
    topk_w: Tensor | None = None
    topk_idx: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """The objective with the mse flag set."""
        return self.loss + 0.1 * self.mse


def collate(model: ClaraReference, record: dict[str, Any]) -> StageBatch:
    """Tokens of the samples in a recorded stage description."""
    tokenizer, stage, items, k = model.tokenizer, record["stage"], record["items"], record["generation_top_k"]
    length = model.settings["doc_max_length"]
    random.seed(record["random_seed"])
    prompts = [item_prompt(tokenizer, stage, k, item) for item in items]
    query = None
    if stage.startswith("stage2"):
        query = encoder_batch(tokenizer, [item["question"] for item in items], record["dec_max_len"])
    return StageBatch(
        stage=stage,
        rows=len(items),
        encoder=encoder_batch(tokenizer, [doc for item in items for doc in item["docs"]], length),
        generator=generator_batch(tokenizer, prompts, record["dec_max_len"]),
        k=k,
        query=query,
        positives=record.get("pos_index", []),
    )


def generator_pass(
    model: ClaraReference, batch: Batch, memory: Tensor, docs_per_row: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, logits and input embeddings of the generator."""
    embeds = model.fill_slots(batch.ids, memory, docs_per_row)
    logits = model.generator_logits(embeds, batch.mask)
    return model.generator_loss(logits, batch.labels), logits, embeds


def cosine_scores(query_reps: Tensor, memory: Tensor, rows: int) -> Tensor:
    """Cosine of each question with each of its candidates, [rows, candidates]."""
    documents = memory.reshape(rows, -1, query_reps.shape[-1])
    return (F.normalize(query_reps.float(), dim=-1)[:, None] * F.normalize(documents.float(), dim=-1)).sum(-1)


def select(memory: Tensor, weights: Tensor) -> Tensor:
    """Documents picked by a selection matrix, [rows * k, n_mem, hidden]."""
    rows, k, n = weights.shape
    picked = weights @ memory.reshape(rows, n, -1)
    return picked.reshape(rows * k, *memory.shape[1:])


def positive_mask(positives: list[list[int]], candidates: int) -> Tensor:
    """[rows, candidates], true where a candidate counts as positive."""
    mask = torch.zeros(len(positives), candidates, dtype=torch.bool)
    for row, indices in enumerate(positives):
        mask[row, indices] = True
    return mask


def retrieval_loss(scores: Tensor, mask: Tensor) -> Tensor:
    """Contrastive loss over samples that have a positive."""
    logits = scores / TEMPERATURE
    kept = mask.any(1)
    positive = logits.masked_fill(~mask, float("-inf"))[kept].logsumexp(-1)
    return -(positive - logits[kept].logsumexp(-1)).mean()


def forward(model: ClaraReference, batch: StageBatch) -> StageOutput:
    """One micro batch of ``batch.stage``."""
    if not batch.stage.startswith("stage2"):
        compressed = model.compress(batch.encoder)
        docs = [len(compressed.memory) // batch.rows] * batch.rows
        loss, logits, embeds = generator_pass(model, batch.generator, compressed.memory, docs)
        return StageOutput(loss, compressed.mse, compressed, embeds, logits)

    with torch.no_grad():
        compressed = model.compress(batch.encoder)
    query_reps = model.encode_queries(batch.query)
    scores = cosine_scores(query_reps, compressed.memory, batch.rows)
    if scores.requires_grad:
        scores.retain_grad()
    weights, index = straight_through_topk(scores, batch.k, TEMPERATURE)
    found = {"query_reps": query_reps, "scores": scores, "topk_w": weights, "topk_idx": index}
    if batch.stage == "stage2_pretrain_retrieval":
        loss = retrieval_loss(scores, positive_mask(batch.positives, scores.shape[1]))
        return StageOutput(loss, compressed.mse, compressed, **found)
    memory = select(compressed.memory, weights)
    loss, logits, embeds = generator_pass(model, batch.generator, memory, [batch.k] * batch.rows)
    return StageOutput(loss, compressed.mse, compressed, embeds, logits, **found)
