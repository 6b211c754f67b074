"""Greedy generation writes the reference's tokens in all its entry points."""

import json
import random
from pathlib import Path

import numpy as np

from tests.parity.case import load_clara, worst_entry


def test_generated_tokens_are_identical(case_folder: Path, entry: str):
    texts = json.loads((case_folder / "generation.json").read_text(encoding="utf-8"))
    run = texts[entry]
    with np.load(case_folder / "generation.npz") as file:
        arrays = {key.split("::")[1]: file[key] for key in file.files if key.startswith(f"{entry}::")}
    clara = load_clara(case_folder.parent / run["checkpoint"])
    documents, questions, new = run["documents"], run["questions"], run["max_new_tokens"]
    if "paraphrase" in entry:
        got = clara.generate_from_paraphrase(documents, new, random.Random(run["random_seed"]))
    elif entry == "generate_from_questions":
        got = clara.generate_from_questions(questions, documents, new, k=arrays["topk_idx"].shape[1])
        np.testing.assert_array_equal(got.selected, arrays["topk_idx"])
        assert worst_entry(got.scores, arrays["scores"]) <= 1e-5
        queries = np.asarray(clara.encode_query(questions))
        assert worst_entry(queries.reshape(len(queries), -1), arrays["query_reps"]) <= 1e-4
    elif entry == "generate_from_text":
        got = clara.generate_from_documents(questions, documents, new)
    else:
        memories = clara.compress([document for row in documents for document in row])
        assert worst_entry(memories, arrays["compressed"]) <= 1e-4
        got = clara.generate(questions, memories.reshape(len(questions), -1, *memories.shape[1:]), new)
    expected = arrays["token_ids"]
    np.testing.assert_array_equal(got.token_ids[:, : expected.shape[1]], expected)
    # The recording stops when every row has ended; what follows here must be padding.
    assert (got.token_ids[:, expected.shape[1] :] == clara.tokenizer.special.pad).all()
    assert got.texts == run["texts"]
