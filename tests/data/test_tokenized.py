"""Tokenised samples on disk: what is read is what was written, in every thread and process."""

import dataclasses
import pickle
import random
import threading

import numpy as np
import pytest

from clara_jax.data.records import parse_record
from clara_jax.data.samples import Limits, instruction_sample, retrieval_sample
from clara_jax.data.token_cache import Recipe, tokenize
from clara_jax.data.tokenized import ROWS
from tests.data.examples import questions, small_tokenizer, write_lines

LIMITS = Limits(40, 20, 400)
RETRIEVAL = Recipe("retrieval", LIMITS, 2, 0)


def all_samples(dataset):
    return [dataset.sample(i) for i in range(len(dataset))]


def test_samples_come_back_unchanged(tmp_path):
    """A token lost or changed on the way through the disk would train another model."""
    rows = questions(ROWS + 30)
    path = write_lines(tmp_path / "data.jsonl", *rows)
    tokenizer = small_tokenizer()
    dataset = tokenize(str(path), tokenizer, RETRIEVAL, tmp_path / "cache")
    expected = [retrieval_sample(parse_record(row), tokenizer, LIMITS, 2) for row in rows]
    assert all_samples(dataset) == expected
    assert all_samples(pickle.loads(pickle.dumps(dataset))) == expected
    assert expected[0].answers == tuple(rows[0]["answers"])
    assert (expected[0].positives, expected[1].positives) == (None, (0,))
    instruction = tokenize(str(path), tokenizer, dataclasses.replace(RETRIEVAL, kind="instruction"), tmp_path / "cache")
    assert instruction.sample(7) == instruction_sample(parse_record(rows[7]), tokenizer, LIMITS, random.Random(0))
    for index in (-1, len(rows)):
        with pytest.raises(IndexError):
            dataset.sample(index)


def test_lengths_and_totals_are_those_of_the_samples(tmp_path):
    """Shapes, padding and tokens per second are planned and reported from these numbers alone."""
    path = write_lines(tmp_path / "data.jsonl", *questions(40))
    dataset = tokenize(str(path), small_tokenizer(memory=2), RETRIEVAL, tmp_path / "cache")
    for sample, lengths, totals in zip(all_samples(dataset), dataset.lengths, dataset.totals, strict=True):
        documents, prompt = [len(ids) + 2 for ids in sample.documents], len(sample.exchange.tokens)
        targets, question = prompt - sample.exchange.prompt_length, len(sample.question) + 2
        assert lengths.tolist() == [len(documents), max(documents), prompt, targets, question]
        assert totals.tolist() == [sum(documents), targets, sum(documents) + prompt + question, sample.cut]
    assert dataset.totals[:, 3].max() > 0


def test_many_threads_read_at_once(tmp_path):
    """Grain prepares batches in threads: a reader with a position of its own would mix samples up."""
    path = str(write_lines(tmp_path / "data.jsonl", *questions(ROWS + 20)))
    dataset = tokenize(path, small_tokenizer(), RETRIEVAL, tmp_path / "cache")
    expected = all_samples(pickle.loads(pickle.dumps(dataset)))
    wrong = []

    def read(seed):
        for i in np.random.default_rng(seed).integers(0, len(dataset), 200).tolist():
            wrong.extend([i] if dataset.sample(i) != expected[i] else [])

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
