"""The order of samples: nothing lost, every epoch another order, and no dependence on where a run goes on."""

import pickle

import numpy as np
import pytest

from clara_jax.data.order import FileOrder, TrainingOrder


def order(sizes=(30, 11, 7), weights=None, batch_size=4, seed=0, classes=3):
    lengths = np.random.default_rng(5).integers(0, classes, sum(sizes)).astype(np.int32)
    return TrainingOrder(sizes, weights, lengths, batch_size, seed)


def taken(plan, batches, start=0):
    return np.concatenate([plan.batch(i) for i in range(start, start + batches)])


@pytest.mark.parametrize(("sizes", "batch_size"), [((48,), 4), ((30, 11, 7), 4), ((3, 4), 7), ((5,), 1), ((700,), 2)])
def test_every_epoch_has_every_sample_once_in_another_order(sizes, batch_size):
    """Some records would never be trained on, or every epoch repeat the same batches."""
    plan, total = order(sizes, batch_size=batch_size), sum(sizes)
    stream = [plan.stream[i] for i in range(3 * total)]
    epochs = [stream[i * total : (i + 1) * total] for i in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(total))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert stream != [order(sizes, seed=1).stream[i] for i in range(3 * total)]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 5, 48])
def test_windows_neither_lose_nor_repeat(batch_size):
    """Putting like lengths together would drop what is left of a class."""
    plan = order(batch_size=batch_size)
    size = plan.window_batches * batch_size
    for window in range(6):
        batches = taken(plan, plan.window_batches, window * plan.window_batches)
        assert sorted(batches) == sorted(plan.stream[i] for i in range(window * size, (window + 1) * size))


def test_batches_are_of_one_class_but_for_what_is_left():
    """Each mixed batch is padded to its largest class: there may be one between two classes, no more."""
    plan = order((4000,), batch_size=8)
    assert plan.window_batches == 64
    batches = [plan.classes[plan.batch(i)] for i in range(64)]
    assert sum(len(set(batch)) > 1 for batch in batches) <= 2
    largest = [batch.max() for batch in batches]
    assert largest != sorted(largest)  # or training would go from short to long in every window


def test_small_data_makes_small_windows():
    """A window of many epochs would put all copies of a record in one batch."""
    assert order((10,), batch_size=4).window_batches == 2
    assert order((3,), batch_size=3).window_batches == 1


def test_a_batch_is_a_function_of_seed_and_number():
    """A run that goes on from a checkpoint, or in another process, would see other batches."""
    plan, expected = order(), [order().batch(i) for i in range(60)]
    for i in np.random.default_rng(0).permutation(60).tolist():
        np.testing.assert_array_equal(plan.batch(i), expected[i])
    copy = pickle.loads(pickle.dumps(plan))
    np.testing.assert_array_equal(copy.batch(59), expected[59])
    assert any((order(seed=1).batch(i) != expected[i]).any() for i in range(5))
    far = order().batch(10**6)
    assert (far.shape, far.max() < 48) == ((4,), True)


@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (3.0, 1.0, 4.0), (1.0, 1.0, 1.0)])
def test_blends_keep_their_weights(weights):
    """Sources would be mixed in other proportions than the experiment says."""
    sizes = (300, 110, 70)
    plan = order(sizes, weights, batch_size=8)
    samples = taken(plan, 240)
    counts = np.histogram(samples, [0, 300, 410, 480])[0] / len(samples)
    np.testing.assert_allclose(counts, np.array(weights) / sum(weights), atol=0.005)
    # Within a source, every sample comes once before any comes again.
    stream = np.array([plan.stream[i] for i in range(2000)])
    for first, size in zip((0, 300, 410), sizes, strict=True):
        own = stream[(stream >= first) & (stream < first + size)]
        if len(own) >= 2 * size:
            assert sorted(own[:size]) == sorted(own[size : 2 * size]) == list(range(first, first + size))
            assert (own[:size] != own[size : 2 * size]).any()


def test_file_order():
    """A score would count samples twice, or leave out the last ones."""
    plan = FileOrder(7, 3)
    assert len(plan) == 3
    assert [plan.batch(i).tolist() for i in range(3)] == [[0, 1, 2], [3, 4, 5], [6, -1, -1]]
