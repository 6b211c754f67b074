"""Scores of rankings, their intervals and TREC's files."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clara_jax.errors import UserError
from clara_jax.scoring.rankings import bootstrap_interval, by_document, mean_scores, ranking_scores, score_rankings
from clara_jax.scoring.retrieval_sums import retrieval_means, retrieval_sums
from clara_jax.scoring.trec import read_run, write_qrels, write_run

RANKING = [("a", 3.0), ("b", 2.0), ("c", 2.0), ("d", -1.0)]


def test_scores_of_one_question():
    """If this broke, the retrieval numbers of a report would be those of another definition."""
    scores = ranking_scores(RANKING, ["b", "d", "z"])
    assert scores == pytest.approx(
        {
            **{"recall@1": 0, "recall@3": 1 / 3, "recall@5": 2 / 3},
            **{"precision@1": 0, "precision@3": 1 / 3, "precision@5": 2 / 5},
            **{"hit@1": 0, "hit@3": 1, "hit@5": 1, "mrr": 1 / 2},
        }
    )
    assert ranking_scores(RANKING, ["z"], ks=[2]) == {"recall@2": 0, "precision@2": 0, "hit@2": 0, "mrr": 0}
    assert ranking_scores(RANKING, []) == {}
    with pytest.raises(ValueError, match="names a document twice"):
        ranking_scores([("a", 1.0), ("a", 0.5)], ["a"])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_means_are_those_of_training(seed):
    """If this broke, recall in a report and recall in the training log would differ for one model and data set."""
    rng = np.random.default_rng(seed)
    scores, positives = rng.integers(-3, 3, (6, 5)).astype(np.float32), rng.random((6, 5)) < 0.3
    rankings = {str(q): by_document([(str(d), float(s)) for d, s in enumerate(row)]) for q, row in enumerate(scores)}
    relevant = {str(q): [str(d) for d in np.flatnonzero(row)] for q, row in enumerate(positives)}
    means = mean_scores(score_rankings(rankings, relevant).values())
    sums = retrieval_sums(*map(jnp.asarray, (scores, positives, np.ones_like(positives))))
    assert {name: value for name, value in means.items() if "recall" in name or "precision" in name} == pytest.approx(
        retrieval_means(sums), rel=1e-6
    )


def test_questions_without_relevant_documents_do_not_count():
    """If this broke, questions whose gold documents are unknown would pull every mean down."""
    scores = score_rankings({"q": RANKING, "other": []}, {"q": ["a"], "none": []})
    assert list(scores) == ["q"] and mean_scores(scores.values())["recall@1"] == 1.0
    assert mean_scores([]) == mean_scores([{}]) == {}


def test_a_missing_ranking_is_refused_and_an_empty_one_scores_nothing():
    """If this broke, the run of another data set would be a system that finds nothing."""
    with pytest.raises(UserError, match=r"question 'p' has relevant documents and no ranking \(1 such of 2\)"):
        score_rankings({"q": RANKING}, {"q": ["a"], "p": ["a"]})
    assert score_rankings({"q": []}, {"q": ["a"]})["q"]["recall@5"] == 0.0


def test_a_document_ranks_by_its_best_passage():
    """If this broke, a long document would take several places of a ranking, or be ranked by its first passage."""
    passages = [("long", 0.1), ("b", 0.5), ("long", 0.9), ("c", 0.5)]
    assert by_document(passages) == [("long", 0.9), ("b", 0.5), ("c", 0.5)]
    assert [name for name, _ in by_document([("nan", float("nan")), ("a", -5.0)])] == ["a", "nan"]


def test_intervals_repeat_and_hold_what_they_should():
    """If this broke, a report would show other intervals each time, or ones that are too narrow or too wide."""
    rng = np.random.default_rng(0)
    values = rng.random(400) < 0.3
    low, high = bootstrap_interval(values.astype(float), seed=1)
    assert (low, high) == bootstrap_interval([float(value) for value in values], seed=1)
    assert (low, high) != bootstrap_interval(values.astype(float), seed=2)
    assert low < values.mean() < high
    error = values.std() / np.sqrt(values.size)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)
    narrow = bootstrap_interval(values.astype(float), seed=1, share=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert bootstrap_interval([0.25], seed=0) == (0.25, 0.25)


def test_intervals_cover_the_true_mean():
    """If this broke, 'a 95 % interval' would not be one."""
    rng = np.random.default_rng(3)
    intervals = [bootstrap_interval(rng.normal(size=80), seed, repeats=300) for seed in range(200)]
    assert 0.90 <= np.mean([low < 0 < high for low, high in intervals]) <= 0.99


@pytest.mark.parametrize(
    "wrong",
    [{"values": []}, {"values": [1.0, float("nan")]}, {"share": 1.0}, {"share": 0.0}, {"repeats": 0}],
)
def test_intervals_of_nothing_are_refused(wrong):
    """If this broke, a question without a score would turn an interval into NaN without a word."""
    with pytest.raises(ValueError):
        bootstrap_interval(**({"values": [1.0, 0.0], "seed": 0} | wrong))


words = st.text(st.characters(codec="utf-8", exclude_categories=["Z", "C"]), min_size=1, max_size=5)
scored = st.dictionaries(words, st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(words, scored, max_size=4))
def test_a_run_file_reads_back_as_it_was(tmp_path_factory, passages):
    """If this broke, the numbers computed from a saved run would not be those of the report beside it."""
    path = tmp_path_factory.mktemp("run") / "run.txt"
    rankings = {question: by_document(found.items()) for question, found in passages.items()}
    write_run(path, rankings, "clara")
    assert read_run(path) == rankings


def test_trec_lines(tmp_path):
    """If this broke, trec_eval would not read the files."""
    write_run(tmp_path / "run", {"q": RANKING[:2]}, "clara")
    assert (tmp_path / "run").read_text() == "q Q0 a 1 3.0 clara\nq Q0 b 2 2.0 clara\n"
    write_qrels(tmp_path / "qrels", {"q": ["a", "b"], "none": []})
    assert (tmp_path / "qrels").read_text() == "q 0 a 1\nq 0 b 1\n"


def test_runs_that_other_programs_would_misread_are_refused(tmp_path):
    """If this broke, an id with a space would shift the columns of its line, or order differ from scores."""
    path = tmp_path / "run"
    for rankings, tag in (({"q": [("a b", 1.0)]}, "t"), ({"": RANKING}, "t"), ({"q": RANKING}, "two words")):
        with pytest.raises(UserError, match=r"is not a word. Ids and tags"):
            write_run(path, rankings, tag)
    with pytest.raises(UserError, match="is not a word"):
        write_qrels(path, {"q": ["a\tb"]})
    for scores in ((1.0, 2.0), (float("nan"), 0.0), (float("inf"), 0.0)):
        with pytest.raises(ValueError, match="must be finite and fall"):
            write_run(path, {"q": list(zip("ab", scores, strict=True))}, "t")
    with pytest.raises(UserError, match="cannot be written"):
        write_qrels(tmp_path / "none" / "qrels", {"q": ["a"]})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q Q0 b 2 1.0", r"line 2: 5 words. It must be: question Q0"),
        ("q Q0 a 2 1.0 t", r"line 2: question 'q' ranks document 'a' twice"),
        ("q Q0 b two 1.0 t", r"line 2: the rank is 'two'"),
        ("q Q0 b 2 nan t", r"line 2: the score is 'nan'"),
        ("q Q0 b 2 high t", r"line 2: the score is 'high'"),
    ],
)
def test_faulty_run_lines_are_named(tmp_path, line, message):
    """If this broke, a damaged run file would give numbers."""
    (tmp_path / "run").write_text(f"q Q0 a 1 2.0 t\n{line}\n")
    with pytest.raises(UserError, match=message):
        read_run(tmp_path / "run")
