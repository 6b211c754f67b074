"""Generation beyond what the reference records: sampling, streaming, buckets, rows that come together."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from clara_jax import Clara
from clara_jax.errors import UserError
from clara_jax.generation import Sampling, choose, generate
from clara_jax.generation_batches import BatchGenerator, TextStream
from tests.conftest import FIXTURES

QUESTIONS = [
    "Who?",
    "Which of the mills north of the river was built first?",
    "In which year did Ada build the mill that stands north of the river?",
]


@pytest.fixture(scope="module")
def clara():
    return Clara.from_pretrained(FIXTURES / "mistral_window" / "ckpt_stage2")


@pytest.fixture(scope="module")
def memories(clara):
    documents = ["The mill stands north.", "Ada built it.", "It is old.", "A river.", "In 1834.", "Nobody knows."]
    made = clara.compress(documents)
    return made.reshape(3, 2, *made.shape[1:])


def test_rows_do_not_depend_on_each_other(clara, memories):
    """If this broke, an answer would change with the questions that happen to be asked beside it."""
    for sampling in (Sampling(), Sampling(temperature=1.0, top_p=0.9, seed=3)):
        together = clara.generate(QUESTIONS, memories, 12, sampling)
        alone = clara.generate(QUESTIONS[:1], memories[:1], 12, sampling)
        assert together.texts[0] == alone.texts[0]
        assert together.token_ids.shape == (3, 12)
    in_parts = BatchGenerator(clara.loaded, batch_rows=1)
    prompts = [clara.tokenizer.encode(question) for question in QUESTIONS]
    none = memories[:, :0]
    whole = BatchGenerator(clara.loaded)(clara.params, prompts, none, 12, Sampling())
    np.testing.assert_array_equal(in_parts(clara.params, prompts, none, 12, Sampling()), whole)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_p=0.8, seed=1)])
def test_a_stream_gives_the_same_text(clara, memories, sampling):
    """If this broke, what a user sees being written would not be the answer that is returned."""
    pieces = ["", "", ""]

    def heard(row, piece):
        pieces[row] += piece

    streamed = clara.generate(QUESTIONS, memories, 20, sampling, heard)
    whole = clara.generate(QUESTIONS, memories, 20, sampling)
    assert streamed.texts == whole.texts == pieces
    np.testing.assert_array_equal(streamed.token_ids, whole.token_ids)


def test_a_stream_never_shows_half_a_character(clara):
    """A character may be several tokens: its first bytes alone decode to a replacement mark that was never written."""
    text = "naïve 猫 → Ωmega"
    stream = TextStream(clara.tokenizer)
    pieces = [stream.add(token) for token in clara.tokenizer.encode(text)]
    assert "\ufffd" not in "".join(pieces) and "" in pieces
    assert "".join(pieces) + stream.end() == clara.tokenizer.decode(clara.tokenizer.encode(text))


def test_no_compilation_within_a_bucket(clara, memories):
    """If this broke, every new question would wait for the compiler."""
    clara.generate(QUESTIONS, memories, 20, Sampling(temperature=0.5))
    clara.generate(QUESTIONS, memories, 20)
    programs = generate._cache_size()
    longer = ["And " + QUESTIONS[2], *QUESTIONS[1:], "Why?"]
    four = jnp.concatenate([memories, memories[:1]])
    for limit in (17, 25, 32):
        clara.generate(QUESTIONS, memories, limit)
        clara.generate(longer, four, limit)
        clara.generate(longer, four, limit, Sampling(temperature=0.9, top_p=0.5, seed=limit))
    assert generate._cache_size() == programs


def test_the_limit_cuts_and_nothing_else(clara, memories):
    """A smaller limit gives the beginning of the same tokens, though both share one program."""
    long = clara.generate(QUESTIONS, memories, 16).token_ids
    short = clara.generate(QUESTIONS, memories, 5).token_ids
    np.testing.assert_array_equal(short, long[:, :5])


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.5, 0.7), (1.0, 0.05), (0.02, 1.0)])
def test_draws_follow_temperature_and_top_p(temperature, top_p):
    """If this broke, sampled answers would be wilder or tamer than what was asked for."""
    logits = np.array([2.0, 1.0, 0.5, 0.5, -1.0, -3.0])
    shares = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    order = np.argsort(-shares, kind="stable")
    kept, total = np.zeros(len(shares), bool), 0.0
    for token in order:  # the fewest likeliest tokens that reach top_p; equally likely ones come together
        if total >= top_p and not np.isclose(shares[token], shares[kept].min()):
            break
        kept[token], total = True, total + shares[token]
    expected = np.where(kept, shares, 0) / shares[kept].sum()
    number = 20_000
    draw = Sampling(temperature=temperature, top_p=top_p, seed=5).draw
    rows = jnp.tile(jnp.asarray(logits, jnp.float32), (number, 1))
    tokens = np.asarray(choose(rows, np.arange(number, dtype=np.int32), jnp.int32(0), draw))
    found = np.bincount(tokens, minlength=len(logits)) / number
    # Five standard deviations of a share that is counted in 20,000 draws.
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / number)).all()


def test_seeds_and_steps_draw_differently(clara, memories):
    """If this broke, another seed would give the same answers, or one seed different ones."""
    texts = [clara.generate(QUESTIONS, memories, 24, Sampling(temperature=2.0, seed=seed)).texts for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    draw = Sampling(temperature=1.0).draw
    logits = jnp.zeros((1, 50))
    steps = {int(choose(logits, np.zeros(1, np.int32), jnp.int32(step), draw)[0]) for step in range(20)}
    assert len(steps) > 5


def test_stop_ids_end_a_row(clara, memories):
    """If this broke, answers would run on past their end, or one row's end would cut the others off."""
    free = clara.generate(QUESTIONS, memories, 16).token_ids
    stop = int(free[1, 2])
    stopping = Clara(dataclasses.replace(clara.loaded, stop_ids=(stop,)))
    for row, expected in zip(stopping.generate(QUESTIONS, memories, 16).token_ids, free, strict=True):
        ends = [*np.flatnonzero(expected == stop), 15]
        np.testing.assert_array_equal(row[: ends[0] + 1], expected[: ends[0] + 1])
        assert (row[ends[0] + 1 :] == clara.tokenizer.special.pad).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1e-39}, "temperature is 1e-39"),
        ({"top_p": 0.0}, r"top_p is 0\.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    """A mistyped setting is named."""
    with pytest.raises(UserError, match=message):
        Sampling(**settings)


def test_bad_requests(clara, memories):
    """Counts that do not fit are named."""
    with pytest.raises(UserError, match="2 prompts for 3 rows"):
        clara.generate(QUESTIONS[:2], memories)
    with pytest.raises(UserError, match="max_new_tokens is 0"):
        clara.generate(QUESTIONS, memories, 0)
    with pytest.raises(UserError, match="batch_rows is 0"):
        BatchGenerator(clara.loaded, 0)
    assert clara.generate(["word " * 3000], memories[:1], 1).cut == 1
    assert clara.generate(QUESTIONS, memories, 1).cut == 0
    # A question without any memory is answered too.
    assert len(clara.generate(QUESTIONS, memories[:, :0], 4).texts) == 3


def test_answers_from_text_are_the_base_model_s(clara):
    """The control "text in the prompt" must not profit from adapters, lose the question, or change the documents."""
    heard = []
    generator = clara._generator

    def listening(params, prompts, *others):
        heard.append((params, prompts))
        return generator(params, prompts, *others)

    clara._generator = listening
    try:
        documents = [["Alpha:\\ beta.", "Gamma {docs}."], ["Delta."], ["word " * 3000]]
        made = clara.answer_from_text(QUESTIONS, documents, 4, prompt_limit=300)
    finally:
        clara._generator = generator
    assert made.cut == 1 and len(made.texts) == 3
    ((params, prompts),) = heard
    assert "generator" not in params and "base" in params
    texts = [clara.tokenizer.decode(prompt) for prompt in prompts]
    assert "Alpha:\\ beta.\n\nGamma {docs}." in texts[0] and "Delta." in texts[1]
    assert all(question in text for question, text in zip(QUESTIONS, texts, strict=True))
    assert 250 < len(prompts[2]) <= 300 and "word word" in texts[2]


def test_the_base_alone_knows_no_memory_tokens():
    """If this broke, memory tokens longer than words would win a tied head: text, the control, would read worse."""
    clara = Clara.from_pretrained(FIXTURES / "llama2_linear" / "ckpt_stage2")
    documents = [["The mill stands north."]] * 3
    before = clara.answer_from_text(QUESTIONS, documents, 12).token_ids
    tokens = clara.params["memory_tokens"]
    # Two opposite ones: whatever the state is, one of them has by far the largest logit.
    clara.params["memory_tokens"] = tokens.at[1].set(-100 * tokens[0]).at[0].set(100 * tokens[0])
    after = clara.answer_from_text(QUESTIONS, documents, 12).token_ids
    assert not np.isin(after, clara.tokenizer.special.memory_ids).any()
    np.testing.assert_array_equal(after, before)
