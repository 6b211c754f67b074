"""The small files beside the case folders: prompts, top-k, metrics, schedules."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .inputs import encoder_batch
from .metrics import pair, retrieval
from .prompts import (
    PARAPHRASE_INSTRUCTIONS,
    Prompt,
    answer_prompt,
    draw_instruction,
    paraphrase_prompt,
    questions_prompt,
)
from .tokens import ClaraTokenizer
from .topk import straight_through_top1, straight_through_topk
from .training import learning_rate


def prompt_entry(root: Path, key: str, texts: list[str], questions: list[str], answers: list[str]) -> dict[str, Any]:
    """One entry of ``prompts.json``; the key names tokenizer, lengths and k."""
    name = key.split("|")[0]
    doc, rate, k = map(int, re.fullmatch(r".*\|doc(\d+)\|rate(\d+)\|k(\d+)", key).groups())
    tokenizer = ClaraTokenizer(root / "tokenizers" / name, name, doc // rate)
    special = tokenizer.ids
    plain = encoder_batch(tokenizer, texts, doc)
    with_query = [encoder_batch(tokenizer, [t], doc, q) for t, q in zip(texts[:2], questions)]
    random.seed(42)
    drawn = [draw_instruction() for _ in range(10)]
    return {
        "doc_max_length": doc,
        "compress_rate": rate,
        "generation_top_k": k,
        "special": {
            "mem_token_ids": special.mem,
            "ae": special.ae,
            "enc": special.enc,
            "sep": special.sep,
            "bos": special.bos,
            "eos": special.eos,
            "pad": special.pad,
            "pad_token": special.pad_token,
            "length": special.length,
        },
        "encoder": {
            "texts": texts,
            "max_length_argument": doc,
            "input_ids": plain.ids.tolist(),
            "attention_mask": plain.mask.tolist(),
            "attention_mask_dtype": "torch.float32",
        },
        "encoder_with_query": {
            "texts": texts[:2],
            "queries": questions,
            "input_ids": [row.ids[0].tolist() for row in with_query],
            "attention_mask": [row.mask[0].tolist() for row in with_query],
        },
        "prompts": _prompts(tokenizer, k, questions, answers),
        "questions": questions,
        "answers": answers,
        "random_choice_first_10_after_seed": {"seed": 42, "index": drawn},
    }


def _prompts(tokenizer: ClaraTokenizer, k: int, questions: list[str], answers: list[str]) -> dict[str, Any]:
    def entry(prompt: Prompt, keep_length: bool = False) -> dict[str, Any]:
        text = prompt.prompt if prompt.full is None else prompt.full
        known = keep_length or prompt.full is not None
        length = len(tokenizer.encode(prompt.prompt)) if known else None
        return {"text": text, "prompt_len": length, "input_ids": tokenizer.encode(text)}

    found = {"stage1_qa": entry(questions_prompt(tokenizer, k, list(zip(questions, answers))))}
    for i in range(len(PARAPHRASE_INSTRUCTIONS)):
        found[f"stage1_paraphrase_{i}"] = entry(paraphrase_prompt(tokenizer, k, i, answers[0]))
        if i < 2:
            generation = entry(paraphrase_prompt(tokenizer, k, i, None))
            found[f"stage1_paraphrase_{i}_generation"] = generation
    for stage, i in (("stage1_2", 0), ("stage2", 1)):
        found[stage] = entry(answer_prompt(tokenizer, k, questions[i], answers[i]))
        generation = answer_prompt(tokenizer, k, questions[i], None)
        found[f"{stage}_generation"] = entry(generation, keep_length=stage == "stage2")
    found["stage1_2_backslash_case"] = entry(answer_prompt(tokenizer, k, "weird:\\ spacing", "ok:\\ kept"))
    return found


def topk_results(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """W, indices and logit gradients for every stored logits and cotangent."""
    found = {}
    for name, cotangent in inputs.items():
        if not name.endswith("::cotangent"):
            continue
        head = name.removesuffix("::cotangent")
        group, which = head.split("::")
        for temperature in (0.02, 0.1, 0.5, 1.0):
            logits = torch.tensor(inputs[f"{group}::logits"], requires_grad=True)
            if which == "top1":
                weights, index = straight_through_top1(logits, temperature)
            else:
                weights, index = straight_through_topk(logits, int(which[1:]), temperature)
            (weights * torch.tensor(cotangent)).sum().backward()
            label = f"{head}::t{temperature}"
            found[f"{label}::W"] = weights.detach().numpy()
            found[f"{label}::idx"] = index.numpy().astype(np.int32)
            found[f"{label}::dlogits"] = logits.grad.numpy()
    return found


def topk_inputs(seed: int, rows: int, candidates: int, ks: list[int]) -> dict[str, np.ndarray]:
    """Random logits (wide and narrow) and cotangents."""
    rng = np.random.default_rng(seed)
    found = {}
    for group, scale in (("wide", 1.0), ("narrow", 0.05)):
        found[f"{group}::logits"] = scale * rng.standard_normal((rows, candidates))
        for which, k in [(f"k{k}", k) for k in ks] + [("top1", 1)]:
            found[f"{group}::{which}::cotangent"] = rng.standard_normal((rows, k, candidates))
    return {name: value.astype(np.float32) for name, value in found.items()}


def schedule(name: str, lr: float, ratio: float, warmup: int, total: int) -> dict[str, Any]:
    """One entry of ``lr_schedule.json``."""
    return {
        "name": name,
        "lr": lr,
        "warmup_ratio": ratio,
        "warmup_steps": warmup,
        "total_steps": total,
        "lr_used_at_step": [learning_rate(name, lr, warmup, total, step) for step in range(total)],
    }


def metric_table(pairs: list[tuple[str, str]], rankings: list[tuple[Any, Any, Any]]) -> dict[str, Any]:
    """``metrics.json`` without the parts that describe the reference's own scripts."""
    return {"pairs": [pair(*p) for p in pairs], "retrieval": [retrieval(*r) for r in rankings]}
