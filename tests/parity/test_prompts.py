"""Special tokens, encoder inputs and prompts equal the recorded ids for every recorded tokenizer."""

import json
import random

import numpy as np
import pytest

from clara_jax.data.collate import pad_encoder_inputs
from clara_jax.data.prompts import (
    PARAPHRASE_INSTRUCTIONS,
    PARAPHRASE_SYSTEM,
    Prompt,
    answer_prompt,
    question_list_answer,
    question_list_prompt,
)
from clara_jax.data.tokenizer import ClaraTokenizer


def recorded_settings(recorded):
    for key, entry in json.loads(recorded("prompts.json").read_text(encoding="utf-8")).items():
        name = key.split("|")[0]
        memory = entry["doc_max_length"] // entry["compress_rate"]
        yield key, entry, ClaraTokenizer(recorded(f"tokenizers/{name}"), memory)


def test_special_tokens(recorded):
    for key, entry, tokenizer in recorded_settings(recorded):
        special, expected = tokenizer.special, entry["special"]
        got = (special.memory_ids, special.ae, special.enc, special.sep, special.bos, special.eos, special.pad)
        names = ("mem_token_ids", "ae", "enc", "sep", "bos", "eos", "pad")
        assert got == tuple(expected[name] for name in names), key
        assert len(tokenizer) == expected["length"], key


def test_encoder_inputs(recorded):
    for key, entry, tokenizer in recorded_settings(recorded):
        expected, limit = entry["encoder"], entry["doc_max_length"]
        for text, ids, mask in zip(expected["texts"], expected["input_ids"], expected["attention_mask"], strict=True):
            passage, _ = tokenizer.encode_passage(text, limit)
            got = pad_encoder_inputs([passage], tokenizer.special, len(ids), "left")
            np.testing.assert_array_equal(got.tokens[0], ids, err_msg=f"{key}: {text[:40]}")
            np.testing.assert_array_equal(got.valid[0], np.array(mask) == 1)


def test_prompts(recorded):
    for key, entry, tokenizer in recorded_settings(recorded):
        k = entry["generation_top_k"]
        for name, expected in entry["prompts"].items():
            prompt, answer = recorded_prompt(name, entry)
            assert prompt.text(tokenizer, k, answer) == expected["text"], f"{key} {name}"
            assert tokenizer.encode(expected["text"]) == expected["input_ids"], f"{key} {name}"
            if answer is not None and expected["prompt_len"] is not None:
                assert len(tokenizer.encode(prompt.text(tokenizer, k))) == expected["prompt_len"], f"{key} {name}"


def recorded_prompt(name: str, entry: dict) -> tuple[Prompt, str | None]:
    """The prompt and answer behind a recorded name."""
    questions, answers = entry["questions"], entry["answers"]
    generation = name.endswith("_generation")
    stem = name.removesuffix("_generation")
    if stem == "stage1_qa":
        return question_list_prompt(), question_list_answer(questions, answers)
    if stem.startswith("stage1_paraphrase_"):
        instruction = PARAPHRASE_INSTRUCTIONS[int(stem.rsplit("_", 1)[1])]
        return Prompt(PARAPHRASE_SYSTEM, instruction), None if generation else answers[0]
    if stem == "stage1_2_backslash_case":
        return answer_prompt("weird:\\ spacing"), "ok:\\ kept"
    number = {"stage1_2": 0, "stage2": 1}[stem]
    return answer_prompt(questions[number]), None if generation else answers[number]


def test_paraphrase_draws(recorded):
    for key, entry, _ in recorded_settings(recorded):
        for draw in [entry["random_choice_first_10_after_seed"]]:
            rng = random.Random(draw["seed"])
            got = [PARAPHRASE_INSTRUCTIONS.index(rng.choice(PARAPHRASE_INSTRUCTIONS)) for _ in draw["index"]]
            assert got == draw["index"], key


def test_unknown_template_error_is_not_hidden(recorded):
    for _, _, tokenizer in recorded_settings(recorded):
        tokenizer.backend.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(Exception, match="roles must alternate"):
            answer_prompt("Why?").text(tokenizer, 1)
