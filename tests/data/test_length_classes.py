"""Length classes: every sample fits its class, and classes leave less padding than one shape for all."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clara_jax.data.length_classes import Shape, choose_classes

CAPS = (267, 1024, 1024, 267)
MOST = (20, *CAPS)
LENGTHS = st.lists(st.tuples(*[st.integers(1, most) for most in MOST]), min_size=1, max_size=60).map(np.array)


def sizes(shape: Shape):
    return np.array([shape.candidates, shape.document, shape.prompt, shape.targets, shape.question])


def padded_columns(lengths, number, top_k=None):
    classes = choose_classes(lengths, CAPS, number, top_k)
    return sum(classes.shapes[i].columns for i in classes.of)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 9), st.none() | st.integers(1, 30))
def test_every_sample_fits_its_class_and_all_larger_ones(lengths, number, top_k):
    """A text would not fit its batch and stop the run, or a shape pass what the memory was planned for."""
    classes = choose_classes(lengths, CAPS, number, top_k)
    assert 1 <= len(classes.shapes) <= number
    for smaller, larger in itertools.pairwise(classes.shapes):
        assert (sizes(smaller) <= sizes(larger)).all()
        assert smaller != larger
    for row, i in zip(lengths, classes.of, strict=True):
        assert (row <= sizes(classes.shapes[i])).all()
        assert i == 0 or (row > sizes(classes.shapes[i - 1])).any() or (top_k or 0) > row[0]
    for shape in classes.shapes:
        assert (sizes(shape)[1:] <= CAPS).all()
        assert all(size % 8 == 0 or size in CAPS for size in sizes(shape)[1:])
        assert shape.slots == (top_k or shape.candidates)
        assert shape.candidates >= (top_k or 0)


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(1, 8))
def test_more_classes_never_pad_more(lengths, number):
    """Paying for a compilation more would make training slower."""
    assert padded_columns(lengths, number + 1) <= padded_columns(lengths, number)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_borders_are_the_best_ones(number):
    """Padding would be left that another choice of borders avoids."""
    rng = np.random.default_rng(number)
    prompts = rng.permutation(np.repeat([8, 16, 64, 72, 400, 1024], [50, 3, 20, 20, 5, 2]))
    lengths = np.stack([np.full(100, n) for n in (1, 96, 0, 8, 0)], axis=1)
    lengths[:, 2] = prompts
    values = sorted(set(prompts.tolist()))
    best = min(
        sum(min(96 + border for border in borders if border >= prompt) for prompt in prompts.tolist())
        for borders in itertools.combinations(values, number)
        if max(borders) == 1024
    )
    assert padded_columns(lengths, number) == best


def test_no_class_is_compiled_for_nothing():
    """Texts of one length would be compiled in four equal shapes."""
    assert len(choose_classes(np.full((50, 5), 9), CAPS, 4).shapes) == 1


def test_mixed_lengths_pad_much_less():
    """Half of the arithmetic would be padding on ordinary data."""
    rng = np.random.default_rng(0)
    prompts = np.clip(rng.lognormal(5, 0.8, 5000), 20, 1024).astype(int)
    lengths = np.stack([np.ones(5000, int), np.full(5000, 100), prompts, prompts // 2, np.zeros(5000, int)], axis=1)
    real = (100 + prompts).sum()
    one, four = (1 - real / padded_columns(lengths, number) for number in (1, 4))
    assert one > 0.7
    assert four < 0.3
