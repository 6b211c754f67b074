"""The pipeline as training uses it: the same batches for any number of processes and workers, each row in its place."""

import itertools
import math

import jax
import numpy as np
import pytest

from clara_jax.data.pipeline import DataConfig, load, sequential_batches, training_batches
from clara_jax.errors import UserError
from tests.data.examples import PARAPHRASE, SINGLE, questions, small_tokenizer, write_lines

COUNT = 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pipeline")


def loaded(folder, kind="retrieval", paths=None, report=lambda line: None, **settings):
    if paths is None:
        paths = [str(write_lines(folder / "data.jsonl", *questions(COUNT)))]
    config = DataConfig(paths, cache_dir=str(folder / "cache"), prompt_max_length=400, **settings)
    return load(config, small_tokenizer(), kind, doc_max_length=64, top_k=3, seed=0, report=report)


def same(a, b):
    for x, y in zip(jax.tree.leaves(a.batch), jax.tree.leaves(b.batch), strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(a.samples, b.samples)
    assert (a.shape, a.padding, a.cut) == (b.shape, b.padding, b.cut)
    assert (a.document_tokens, a.target_tokens) == (b.document_tokens, b.target_tokens)


@pytest.mark.parametrize("kind", ["compression", "instruction", "retrieval"])
def test_batches_hold_the_samples_they_name(folder, kind):
    """Tokens would belong to another sample, or the logged counts to another batch."""
    data = loaded(folder, kind)
    batches = training_batches(data, 4, seed=0)
    for counted in itertools.islice(batches.iterate(), 12):
        batch, shape = counted.batch, counted.shape
        assert shape in batches.shapes
        assert batch.documents.tokens.shape == (4, shape.candidates, shape.document)
        assert batch.prompts.tokens.shape == (4, shape.prompt)
        assert batch.prompts.slots.shape == (4, shape.slots, 2)
        assert batch.prompts.target_tokens.shape == (4, shape.targets)
        np.testing.assert_array_equal(batch.rows, range(4))
        for row, number in enumerate(counted.samples):
            sample = data.sample(int(number))
            ids = sample.exchange.tokens
            assert batch.prompts.tokens[row, : len(ids)].tolist() == ids
            assert batch.candidates[row].sum() == len(sample.documents)
        masks = [batch.documents.valid & batch.candidates[:, :, None], batch.prompts.valid]
        assert counted.document_tokens == masks[0].sum()
        assert counted.target_tokens == batch.prompts.target_weights.sum()
        if kind == "retrieval":
            assert shape.candidates >= shape.slots == 3
            assert batch.questions.tokens.shape == (4, shape.question)
            masks.append(batch.questions.valid)
        else:
            assert batch.questions is batch.positives is None
        assert counted.padding == pytest.approx(1 - sum(m.sum() for m in masks) / sum(m.size for m in masks))
        assert counted.cut == sum(data.sample(int(i)).cut for i in counted.samples)


def test_rows_of_a_process_are_those_of_the_whole_batch(folder):
    """Processes would train on other samples, or compile other shapes and wait for each other forever."""
    data = loaded(folder)
    whole = training_batches(data, 6, seed=0)
    for rows in ([0, 1, 2], [3, 4, 5], [5, 0]):
        mine = training_batches(data, 6, seed=0, rows=rows)
        for number, part in enumerate(itertools.islice(mine.iterate(), 6)):
            full = whole[number]
            for x, y in zip(jax.tree.leaves(part.batch), jax.tree.leaves(full.batch), strict=True):
                np.testing.assert_array_equal(x, y[rows])
            assert (part.shape, part.padding, part.cut) == (full.shape, full.padding, full.cut)
            np.testing.assert_array_equal(part.samples, full.samples)


def test_a_run_goes_on_with_the_same_batches(folder):
    """A run that was stopped would repeat batches or leave some out."""
    data = loaded(folder)
    first = list(itertools.islice(training_batches(data, 4, seed=0).iterate(), 30))
    for start in (1, 7, 29):
        rest = itertools.islice(training_batches(data, 4, seed=0).iterate(start), 30 - start)
        for a, b in zip(first[start:], rest, strict=True):
            same(a, b)
    assert any(
        (a.samples != b.samples).any() for a, b in zip(first, training_batches(data, 4, 1).iterate(), strict=False)
    )


def test_workers_do_not_change_the_batches(folder):
    """A faster machine with more workers would train another model."""
    data = loaded(folder)
    batches = training_batches(data, 4, seed=0, workers=2)
    for a, b in zip(itertools.islice(batches.iterate(3), 9), training_batches(data, 4, 0).iterate(3), strict=False):
        same(a, b)


def test_an_epoch_and_its_padding(folder):
    """Padding reported before the run would not be what the run has."""
    data = loaded(folder)
    padding = {}
    for classes in (1, 4):
        batches = training_batches(data, 5, seed=0, length_classes=classes)
        epoch = list(itertools.islice(batches.iterate(), COUNT // 5))
        assert sorted(np.concatenate([c.samples for c in epoch])) == list(range(COUNT))
        columns = [5 * c.shape.columns for c in epoch]
        assert batches.expected_padding == pytest.approx(np.average([c.padding for c in epoch], weights=columns))
        padding[classes] = batches.expected_padding
    assert padding[4] < padding[1] - 0.05


def test_evaluation_reads_each_sample_once_in_order(folder):
    """Scores would be of other samples than the answers they are compared with."""
    data = loaded(folder)
    for limit, workers, expected in ((None, 0, COUNT), (7, 0, 7), (7, 1, 7), (1000, 0, COUNT)):
        batches = sequential_batches(data, 4, workers=workers, limit=limit)
        found = list(batches.iterate())
        numbers = np.concatenate([counted.samples for counted in found])
        assert len(numbers) == 4 * math.ceil(expected / 4)
        assert numbers.tolist() == [i if i < expected else -1 for i in range(len(numbers))]
        assert len({counted.shape for counted in found}) == len(batches.shapes) == 1
        last = found[-1].batch
        masked = found[-1].samples < 0
        assert masked.any()
        assert not last.candidates[masked].any()
        assert not last.positives[masked].any()
        assert not last.prompts.target_weights[masked].any()
        assert sum(counted.target_tokens for counted in found) == data.totals[:expected, 1].sum()
    assert [data.sample(i).answers[0] for i in range(5)] == ["0", "1", "2", "3", "4"]
    rows = sequential_batches(data, 4, rows=[2, 3], limit=7)
    np.testing.assert_array_equal(rows[1].batch.rows, [2, 3])
    np.testing.assert_array_equal(rows[1].batch.prompts.target_weights[1], 0)


def test_several_sources_and_the_report(tmp_path):
    """What was skipped and cut must be said, source by source; a blend must know its sources apart."""
    one = str(write_lines(tmp_path / "one.jsonl", *questions(6)))
    two = str(write_lines(tmp_path / "two.jsonl", SINGLE, PARAPHRASE, SINGLE))
    said = []
    data = loaded(tmp_path, paths=[one, two], report=said.append, on_bad_record="skip", weights=[1.0, 3.0])
    assert said[1].startswith(f"{one}: 6 samples, 0 skipped, ")
    assert said[2].startswith(f"{two}: tokenising into {tmp_path}")
    assert "2 samples, 1 skipped (first: line 2: field 'question' is missing" in said[3]
    assert said[3].endswith(" 0 texts longer than their limit")
    assert len(data) == 8
    assert data.sample(6).answers == data.sample(7).answers == ("Ada",)
    for number in (8, -9):
        with pytest.raises(IndexError):
            data.sample(number)
    found = [c.samples for c in itertools.islice(training_batches(data, 4, 0).iterate(), 50)]
    assert np.mean(np.concatenate(found) >= 6) == pytest.approx(0.75, abs=0.01)
    prints = {
        data.fingerprint,
        loaded(tmp_path, paths=[one, two], on_bad_record="skip", weights=[1.0, 2.0]).fingerprint,
        loaded(tmp_path, paths=[one, two], on_bad_record="skip").fingerprint,
        loaded(tmp_path, paths=[one], on_bad_record="skip").fingerprint,
    }
    assert len(prints) == 4
    # The same samples elsewhere: a run may go on where its data was moved, or cleaned of what was skipped.
    moved = str(write_lines(tmp_path / "moved.jsonl", SINGLE, b"", SINGLE))
    assert data.fingerprint == loaded(tmp_path, paths=[one, moved], weights=[1.0, 3.0]).fingerprint


def test_less_data_than_a_batch(folder):
    """The same records would come several times in a batch without a word."""
    with pytest.raises(UserError, match=r"data\.path holds 50 samples, batch_size is 51"):
        training_batches(loaded(folder), 51, seed=0)
    with pytest.raises(UserError, match="seed is -1"):
        training_batches(loaded(folder), 4, seed=-1)
    with pytest.raises(UserError, match="0 samples"):
        sequential_batches(loaded(folder), 4, limit=0)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"path": []}, r"data\.path is empty"),
        ({"weights": [1.0]}, r"data\.weights has 1 numbers and data\.path 2"),
        ({"weights": [1.0, 0.0]}, r"data\.weights holds 0\.0"),
        ({"weights": [1.0, -2.0]}, r"data\.weights holds -2\.0"),
        ({"weights": [1.0, math.nan]}, r"data\.weights holds nan"),
        ({"weights": [1.0, math.inf]}, r"data\.weights holds inf"),
        ({"length_classes": 0}, r"data\.length_classes is 0"),
        ({"question_max_length": 0}, r"data\.question_max_length is 0"),
        ({"prompt_max_length": -1}, r"data\.prompt_max_length is -1"),
        ({"workers": -1}, r"data\.workers is -1"),
    ],
)
def test_a_wrong_setting_is_named(settings, named):
    """A wrong number would show up hours later, or never."""
    with pytest.raises(UserError, match=named):
        DataConfig(**({"path": ["a", "b"]} | settings))
