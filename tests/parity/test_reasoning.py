"""A batch whose rows hold different numbers of documents, as interleaved search builds them."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from clara_jax.data.collate import Batch, Exchange, pad_candidates, pad_exchanges
from clara_jax.training.objectives import ObjectiveConfig, compression_objective
from tests.parity.case import load_clara, worst_entry


def test_rows_with_different_numbers_of_documents(case_folder: Path):
    path = case_folder / "stage2_reasoning_forward.json"
    if not path.exists():
        pytest.skip(f"{case_folder.name} has no stage2_reasoning_forward")
    texts = json.loads(path.read_text(encoding="utf-8"))
    with np.load(path.with_suffix(".npz")) as file:
        arrays = {name: file[name] for name in file.files}
    clara = load_clara(case_folder.parent / texts["checkpoint"])
    tokenizer, special = clara.tokenizer, clara.tokenizer.special
    numbers = texts["docs_num"]
    passages = [tokenizer.encode_passage(text, clara.doc_max_length)[0] for text in texts["documents"]]
    rows = [passages[sum(numbers[:i]) : sum(numbers[: i + 1])] for i in range(len(numbers))]
    documents, exists = pad_candidates(rows, special, clara.doc_max_length + 3 + special.num_memory)
    exchanges = [
        Exchange(tokenizer.encode(prompt), length)
        for prompt, length in zip(texts["prompts"], answer_starts(arrays), strict=True)
    ]
    longest = max(len(exchange.tokens) for exchange in exchanges)
    batch = Batch(documents, exists, pad_exchanges(exchanges, numbers, special, longest, longest))
    objective = compression_objective(clara.model, ObjectiveConfig())
    _, metrics = jax.jit(objective)({}, clara.params, batch, None)
    memories, _ = jax.jit(clara.model.encode, static_argnums=1)(clara.params, "compressor", documents)
    assert worst_entry(np.asarray(memories)[exists], arrays["compressed"]) <= 1e-4
    assert float(metrics["cross_entropy"]) == pytest.approx(float(arrays["loss"]), rel=1e-5)
    assert float(metrics["mse"]) == pytest.approx(float(arrays["mse_loss"]), rel=1e-5)


def answer_starts(arrays: dict[str, np.ndarray]) -> list[int]:
    """Number of tokens before the first label of each row."""
    starts = (arrays["labels"] != -100).argmax(axis=1)
    padding = (arrays["dec_attention_mask"] == 1).argmax(axis=1)
    return [int(start - pad) for start, pad in zip(starts, padding, strict=True)]
