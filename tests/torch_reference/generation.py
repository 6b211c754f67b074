"""Greedy generation and the public entry points."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from .inputs import encoder_batch, prompt_batch
from .model import ClaraReference
from .prompts import Prompt, answer_prompt, draw_instruction, paraphrase_prompt
from .stages import TEMPERATURE, cosine_scores, select
from .topk import straight_through_topk


def greedy(model: ClaraReference, embeds: Tensor, mask: Tensor, max_new_tokens: int) -> dict[str, Tensor]:
    """New tokens only; the whole sequence is recomputed at every step.

    Positions are counted from the first real token.  A row that has met a
    stop token is continued with the pad token until all rows have.
    """
    table = model.decoder.get_input_embeddings()
    stops = torch.tensor(model.stop_ids)
    done = torch.zeros(len(embeds), dtype=torch.bool)
    tokens, margins, first = [], [], None
    for _ in range(max_new_tokens):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model.generator_logits(embeds, mask, positions)[:, -1]
        first = logits if first is None else first
        best = logits.topk(2, dim=-1).values
        margins.append(best[:, 0] - best[:, 1])
        token = torch.where(done, model.tokenizer.ids.pad, logits.argmax(-1))
        tokens.append(token)
        done = done | torch.isin(token, stops)
        if bool(done.all()):
            break
        embeds = torch.cat([embeds, table(token)[:, None]], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return {
        "token_ids": torch.stack(tokens, 1),
        "top2_margin": torch.stack(margins, 1),
        "first_step_logits": first,
    }


def answer_from_memory(
    model: ClaraReference, prompts: list[Prompt], memory: Tensor, k: int, max_new_tokens: int
) -> dict[str, Any]:
    """Generate after writing ``k`` documents per row into the prompts."""
    batch = prompt_batch(model.tokenizer, prompts)
    embeds = model.fill_slots(batch.ids, memory, [k] * len(prompts))
    found: dict[str, Any] = greedy(model, embeds, batch.mask, max_new_tokens)
    found["attention_mask"] = batch.mask
    found["inputs_embeds"] = embeds * batch.mask[..., None]
    found["texts"] = [model.tokenizer.decode(row.tolist(), skip_special=True) for row in found["token_ids"]]
    return found


@torch.no_grad()
def run_entry_point(model: ClaraReference, name: str, record: dict[str, Any]) -> dict[str, Any]:
    """One entry of ``generation.json``: arrays, texts and k."""
    tokenizer, length = model.tokenizer, model.settings["doc_max_length"]
    documents, questions = record["documents"], record["questions"]
    rows, limit = len(documents), record["max_new_tokens"]
    memory = model.compress(encoder_batch(tokenizer, [d for docs in documents for d in docs], length))

    if name == "generate_from_questions":
        k = model.settings["generation_top_k"]
        reps = model.encode_queries(encoder_batch(tokenizer, questions, length))
        scores = cosine_scores(reps, memory.memory, rows)
        weights, index = straight_through_topk(scores, k, TEMPERATURE)
        prompts = [answer_prompt(tokenizer, k, question, None) for question in questions]
        found = answer_from_memory(model, prompts, select(memory.memory, weights), k, limit)
        return found | {"topk_idx": index, "scores": scores, "query_reps": reps, "generation_top_k": k}

    k = len(documents[0])
    extra: dict[str, Any] = {"generation_top_k": k}
    if name.startswith("generate_from_paraphrase"):
        random.seed(record["random_seed"])
        drawn = [draw_instruction() for _ in documents]
        prompts = [paraphrase_prompt(tokenizer, k, i, None) for i in drawn]
        extra["paraphrase_instruction_index"] = drawn
    else:
        prompts = [answer_prompt(tokenizer, k, question, None) for question in questions]
    if name == "generate_from_compressed_documents_and_questions":
        extra |= {"compressed": memory.memory, "mse_loss": memory.mse}
    return answer_from_memory(model, prompts, memory.memory, k, limit) | extra
