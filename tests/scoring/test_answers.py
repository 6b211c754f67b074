"""Scores of answers."""

import pytest

from clara_jax.errors import UserError
from clara_jax.scoring.answers import best, cover_exact_match, exact_match, f1, normalise, score_answers


def test_normalise():
    """If this broke, an answer would be wrong for a capital, an article or a full stop."""
    assert normalise("  The U.S.A.,\tan   island \n") == "usa island"
    assert [normalise(text) for text in ("True", "False", "true", "True.")] == ["yes", "no", "true", "true"]


def test_best_of_several_accepted_answers():
    """If this broke, a question with aliases would be scored against one of them alone."""
    assert best(f1, "Paris in France", ["London", "Paris"]) == 0.5
    assert best(exact_match, "paris", ["London", "Paris"]) == 1.0


def test_yes_and_no_earn_nothing_by_halves():
    """If this broke, 'no, it is not' would earn a part of the points of 'no'."""
    assert f1("no it is not", "no") == 0.0
    assert cover_exact_match("no it is not", "no") == 1.0
    assert f1("No.", "no") == 1.0


def test_score_answers_means_over_questions():
    """If this broke, the reported percentages would be those of something else than all questions."""
    scores = score_answers(["Paris", "a red house", ""], [["paris"], ["house", "the house"], ["no"]])
    assert scores == pytest.approx({"em": 1 / 3, "f1": (1 + 2 / 3) / 3, "cover_em": 2 / 3})
    assert score_answers([], []) == {}


def test_a_question_without_answers_is_named():
    """If this broke, one record without an answer would stop an evaluation without saying which."""
    with pytest.raises(UserError, match="question 2 of 2 accepts no answer"):
        score_answers(["a", "b"], [["a"], []])
    with pytest.raises(ValueError):
        score_answers(["a"], [])
