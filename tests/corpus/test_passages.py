"""Passages: nothing of a long document is lost, nothing is too long, and borders are where a reader would cut."""

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from clara_jax.corpus.documents import Document
from clara_jax.corpus.passages import count_tokens, cut_passages, titled, token_starts
from clara_jax.corpus.sentences import sentence_starts
from clara_jax.errors import UserError
from tests.data.examples import small_tokenizer
from tests.data.test_tokenizer import NAMES

ENGLISH = 'Mr. Smith met J. Doe, i.e. a clerk. He asked: "Why?" Then he left! It cost 3.5 pounds.\nA new line'
WORDS = (
    "Ada wrote the first program. ",
    "Why? ",
    "a" * 300 + " ",
    "\n\n",
    "  \t",
    "他写了程序。",
    "é",
    "e\u0301",
    "😀",
    "<s>",
)


def document(text, title=""):
    return Document("d", title, text, "corpus.jsonl, line 1")


def sentences(text):
    starts = [0, *sentence_starts(text).tolist()]
    return [text[start:end].strip() for start, end in itertools.pairwise(starts)]


def check(found, text, title, tokenizer, limit):
    """What must hold for any passages of a text."""
    seen = 0
    for number, passage in enumerate(found):
        assert (passage.document, passage.index) == ("d", number)
        assert passage.text == text[passage.start : passage.end] != ""
        assert not text[seen : max(seen, passage.start)].strip(), "text between passages is lost"
        assert passage.end > seen, "a passage brings nothing new"
        assert passage.titled_text == titled(passage.title, passage.text)
        seen = passage.end
    assert not text[seen:].strip(), "the end of the text is lost"
    assert [passage.start for passage in found] == sorted({passage.start for passage in found})
    counts = count_tokens(tokenizer, [passage.titled_text for passage in found])
    assert max(counts, default=0) <= limit
    ids = tokenizer.encode_passages([passage.titled_text for passage in found], limit)
    assert not any(cut for _, cut in ids), "the compressor would cut a passage"
    if text.strip() and count_tokens(tokenizer, [titled(title.strip(), text)])[0] <= limit:
        assert (found[0].start, found[0].end, len(found)) == (0, len(text), 1)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(
    text=st.one_of(st.text(max_size=400), st.lists(st.sampled_from(WORDS), max_size=40).map("".join)),
    title=st.one_of(st.just(""), st.text(max_size=60), st.sampled_from(WORDS)),
    limit=st.integers(48, 90),
    overlap=st.integers(0, 47),
)
def test_any_text_is_covered_by_passages_that_fit(name, text, title, limit, overlap):
    """The end of a document, or a piece between two passages, would never be found by any question."""
    tokenizer = small_tokenizer(name=name)
    check(cut_passages(document(text, title), tokenizer, limit, overlap), text, title, tokenizer, limit)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60), limit=st.integers(1, 12), name=st.sampled_from(NAMES))
def test_small_limits_end_in_passages_or_a_refusal(text, limit, name):
    """A limit that some character does not fit would be an endless loop."""
    tokenizer = small_tokenizer(name=name)
    try:
        found = cut_passages(document(text), tokenizer, limit, 0)
    except UserError as error:
        assert f"limit is {limit}" in str(error)
    else:
        check(found, text, "", tokenizer, limit)


def test_sentences_of_english():
    """A passage would end behind 'Mr.' or in the middle of a number."""
    assert sentences(ENGLISH) == [
        "Mr. Smith met J. Doe, i.e. a clerk.",
        'He asked: "Why?"',
        "Then he left!",
        "It cost 3.5 pounds.",
        "A new line",
    ]


def test_sentences_of_chinese():
    """Texts without spaces between sentences would be cut in the middle of words."""
    text = "他写了程序。她问:“为什么?”真的吗？是的！好"
    assert sentences(text) == ["他写了程序。", "她问:“为什么?”真的吗？", "是的！", "好"]


def test_texts_without_sentences():
    """A text without a single mark, or of nothing else, must still give borders."""
    assert sentences("no mark at all") == ["no mark at all"]
    assert sentences("a\nb\r\n\n c\n") == ["a", "b", "c"]
    assert sentence_starts("").tolist() == [0]
    assert sentences("...\n") == ["..."]


@pytest.mark.parametrize("text", ["." * 1_000_000, " " * 1_000_000, "a." * 500_000, '."' * 500_000, "\n" * 1_000_000])
def test_borders_take_linear_time(text):
    """A page of dots would stop a corpus for hours; pytest would not come back here."""
    assert sentence_starts(text)[-1] == len(text)


@pytest.mark.parametrize("name", NAMES)
def test_whole_sentences_and_overlap(name):
    """Passages would begin in the middle of a sentence, or without what the sentence before said."""
    text = " ".join(f"Sentence number {number} is here." for number in range(60))
    tokenizer = small_tokenizer(name=name)
    without = cut_passages(document(text), tokenizer, 80, 0)
    assert all(passage.text.startswith("Sentence") and passage.text.endswith("here.") for passage in without)
    assert all(text[a.end : b.start] == " " for a, b in itertools.pairwise(without))
    overlapping = cut_passages(document(text), tokenizer, 80, 40)
    check(overlapping, text, "", tokenizer, 80)
    for before, after in itertools.pairwise(overlapping):
        repeated = text[after.start : before.end]
        assert repeated.startswith("Sentence") and repeated.endswith("here.")
        assert count_tokens(tokenizer, [repeated])[0] <= 42


def test_passages_are_full():
    """Each memory that is half empty is one more to compress, to keep and to search."""
    text = " ".join(f"Sentence number {number} is here." for number in range(300))
    tokenizer = small_tokenizer()
    found = cut_passages(document(text), tokenizer, 200, 0)
    longest = max(count_tokens(tokenizer, sentences(text)))
    assert min(count_tokens(tokenizer, [passage.text for passage in found[:-1]])) >= 200 - longest - 4


def test_a_sentence_longer_than_the_limit_is_cut_between_words():
    """Words cut in two read as other words."""
    text = "Short one. " + " ".join(f"word{number}" for number in range(200)) + ". Short two."
    tokenizer = small_tokenizer()
    found = cut_passages(document(text), tokenizer, 60, 20)
    check(found, text, "", tokenizer, 60)
    assert {word for passage in found for word in passage.text.split()} == set(text.split())
    assert found[0].text == "Short one."


def test_no_words_either():
    """Chinese without marks, or a line of base64, has no border at all."""
    for text in ("程序" * 300, "x" * 900):
        tokenizer = small_tokenizer()
        found = cut_passages(document(text), tokenizer, 60, 20)
        check(found, text, "", tokenizer, 60)
        assert "".join(passage.text for passage in found) == text


@pytest.mark.parametrize("name", NAMES)
def test_a_document_that_just_fits_is_one_passage(name):
    """The tokens that are left free in longer documents must not cut one that fits."""
    tokenizer = small_tokenizer(name=name)
    text = "  Ada wrote it. Why? Nobody knows.\n"
    limit = count_tokens(tokenizer, [titled("Ada", text)])[0]
    (passage,) = cut_passages(document(text, "Ada"), tokenizer, limit, 4)
    assert passage.titled_text == "Ada\n" + text
    assert len(cut_passages(document(text, "Ada"), tokenizer, limit - 6, 4)) > 1


def test_titles():
    """The title is what says whom a later passage is about; a very long one must leave room for text."""
    tokenizer = small_tokenizer()
    text = "Ada wrote it. " * 40
    found = cut_passages(document(text, " Ada Lovelace "), tokenizer, 60, 0)
    assert all(passage.titled_text.startswith("Ada Lovelace\nAda wrote it.") for passage in found)
    long_title = " ".join(f"name{number}" for number in range(100))
    found = cut_passages(document(text, long_title), tokenizer, 60, 0)
    check(found, text, long_title, tokenizer, 60)
    (title,) = {passage.title for passage in found}
    assert long_title.startswith(title + " ")
    assert count_tokens(tokenizer, [title + "\n"])[0] <= 32


def test_white_space():
    """A megabyte of spaces inside a document must neither be a passage nor hide what follows."""
    tokenizer = small_tokenizer()
    assert cut_passages(document(" \n\t ", "title"), tokenizer, 60, 0) == []
    text = "\n" * 1000 + "one." + " " * 1_000_000 + "two."
    assert [passage.text for passage in cut_passages(document(text), tokenizer, 60, 10)] == ["one.", "two."]


def test_long_documents_are_measured_in_blocks(monkeypatch):
    """A document of 10 MB would take gigabytes as one list of tokens; its blocks must count as the whole does."""
    monkeypatch.setattr("clara_jax.corpus.passages._BLOCK", 100)
    monkeypatch.setattr("clara_jax.corpus.passages._BLOCKS", 3)
    text = "Ada wrote the first program. " * 50
    tokenizer = small_tokenizer()
    starts = token_starts(tokenizer, text)
    assert abs(len(starts) - len(tokenizer.encode(text))) <= len(text) // 100
    assert (starts[1:] >= starts[:-1]).all() and starts[-1] < len(text)
    check(cut_passages(document(text), tokenizer, 60, 20), text, "", tokenizer, 60)


@pytest.mark.parametrize("overlap", [-1, 60, 100])
def test_overlaps_that_leave_no_room(overlap):
    """An overlap as long as the passage would repeat one passage for ever."""
    with pytest.raises(UserError, match=r"60 tokens that repeat.*overlap"):
        cut_passages(document("text"), small_tokenizer(), 60, overlap)


def test_a_limit_that_no_character_fits():
    """The user must learn which document, and that the limit is the cause."""
    with pytest.raises(UserError, match=r"corpus\.jsonl, line 1: title and character 0 .* limit is 2.*doc_max_length"):
        cut_passages(document("😀😀"), small_tokenizer(), 2, 0)
