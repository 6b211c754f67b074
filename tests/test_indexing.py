"""From a corpus to a memory store: every passage once, nothing computed twice, bad corpora refused at once."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from clara_jax import Clara
from clara_jax.corpus.documents import Document
from clara_jax.errors import UserError
from clara_jax.indexing import IndexConfig, _groups, index_corpus
from clara_jax.progress import CountProgress
from clara_jax.retrieval.store import MemoryStore
from clara_jax.sharding import MeshConfig, make_mesh
from clara_jax.training.runs import load_model
from tests.conftest import FIXTURES

MODEL = FIXTURES / "mistral_window" / "ckpt_stage2"
SMALL = IndexConfig(overlap=8, segment=2, batch_tokens=256)


@pytest.fixture(scope="module")
def loaded():
    return load_model(MODEL)


@pytest.fixture(scope="module")
def clara(loaded):
    return Clara(loaded)


def words(seed, number=60):
    """A text of a few sentences."""
    rng = np.random.default_rng(seed)
    names = rng.choice(["river", "Ada", "mill", "seven", "stands", "north", "of", "the"], number)
    return " ".join(name + ("." if n % 9 == 8 else "") for n, name in enumerate(names))


def corpus(path, documents):
    """A corpus file of (id, title, text)."""
    rows = [{"id": name, "title": title, "text": text} for name, title, text in documents]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [str(path)]


FIVE = [(f"d{n}", f"Title {n}", words(n, 10 + 30 * n)) for n in range(5)]


def everything(location):
    """All passages of a store with their memories."""
    store = MemoryStore.open(location)
    numbers = np.arange(len(store))
    return store.passages(numbers), store.memories(numbers)


def assert_same_store(one, other):
    """Passage for passage, bit for bit."""
    (a, b), (c, d) = everything(one), everything(other)
    assert a == c
    np.testing.assert_array_equal(b, d)


def test_every_passage_is_compressed_as_the_api_does(tmp_path, loaded, clara):
    """If this broke, a store would hold other memories than `Clara.compress` makes, or lose the end of documents."""
    indexed = index_corpus(loaded, str(tmp_path / "store"), corpus(tmp_path / "c.jsonl", FIVE), SMALL)
    passages, memories = everything(tmp_path / "store")
    assert (indexed.new, indexed.passages, indexed.store.documents) == (5, len(passages), 5)
    assert 0 < indexed.padding < 0.5
    texts = {name: text for name, _, text in FIVE}
    for name, text in texts.items():
        of_document = [p for p in passages if p.document == name]
        assert [p.index for p in of_document] == list(range(len(of_document)))
        covered = set().union(*(range(p.start, p.end) for p in of_document))
        assert all(place in covered for place, character in enumerate(text) if not character.isspace())
        assert all(p.text == text[p.start : p.end] for p in of_document)
    assert len(passages) > 5  # some are longer than the model reads
    expected = np.asarray(clara.compress([p.titled_text for p in passages]))
    np.testing.assert_allclose(memories, expected, rtol=2**-7, atol=1e-6)  # bfloat16, and batches of other shapes


def test_only_what_is_new_is_compressed(tmp_path, loaded):
    """If this broke, adding a document to a large corpus would cost all of it again, or leave old texts in."""
    location = str(tmp_path / "store")
    first = index_corpus(loaded, location, corpus(tmp_path / "a.jsonl", FIVE), SMALL)
    again = index_corpus(loaded, location, corpus(tmp_path / "a.jsonl", FIVE), SMALL)
    assert (again.new, again.unchanged, again.passages, again.store) == (0, 5, 0, None)
    revised = [FIVE[0], ("d1", "Title 1", "Another text."), ("d9", "", "A new one.")]
    update = index_corpus(loaded, location, corpus(tmp_path / "b.jsonl", revised), SMALL)
    assert (update.new, update.changed, update.unchanged, update.passages) == (1, 1, 1, 2)
    assert update.store.documents == 6 and first.store.generation + 1 == update.store.generation
    passages, _ = everything(location)
    assert [p.text for p in passages if p.document == "d1"] == ["Another text."]
    pruned = index_corpus(
        loaded, location, corpus(tmp_path / "b.jsonl", revised), dataclasses.replace(SMALL, prune=True)
    )
    assert (pruned.deleted, pruned.store.documents, pruned.passages) == (3, 3, 0)
    assert {p.document for p in everything(location)[0]} == {"d0", "d1", "d9"}
    # A document of which only the title is another is another document: the compressor reads the title.
    renamed = index_corpus(loaded, location, corpus(tmp_path / "c.jsonl", [("d9", "Now titled", "A new one.")]), SMALL)
    assert (renamed.changed, renamed.passages) == (1, 1)


def test_what_an_earlier_run_has_made_is_found(tmp_path, loaded, monkeypatch):
    """If this broke, a killed run would begin anew, or leave a store that differs from an uninterrupted one."""
    whole, killed = str(tmp_path / "whole"), str(tmp_path / "killed")
    names = corpus(tmp_path / "c.jsonl", FIVE)
    index_corpus(loaded, whole, names, SMALL)
    with monkeypatch.context() as patch:
        patch.setattr("clara_jax.retrieval.writer.StoreWriter.commit", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            index_corpus(loaded, killed, names, SMALL)
    last = sorted((tmp_path / "killed" / "segments").glob("*/segment.json"), key=lambda p: p.stat().st_mtime)[-1]
    last.unlink()  # as if the kill had come while the last segment was written
    indexed = index_corpus(loaded, killed, names, SMALL)
    assert indexed.found == 4 and indexed.passages > 0
    assert_same_store(whole, killed)


def test_damaged_segments_are_compressed_anew(tmp_path, loaded):
    """If this broke, a damaged store could only be thrown away."""
    whole, mended = str(tmp_path / "whole"), str(tmp_path / "mended")
    names = corpus(tmp_path / "c.jsonl", FIVE)
    for location in (whole, mended):
        index_corpus(loaded, location, names, SMALL)
    next((tmp_path / "mended" / "segments").glob("*/memories/c/0/0/0")).unlink()
    indexed = index_corpus(loaded, mended, names, dataclasses.replace(SMALL, repair=True))
    assert len(indexed.remarks) == 1 and "is missing" in indexed.remarks[0]
    passages, memories = everything(mended)
    expected = dict(zip(everything(whole)[0], everything(whole)[1], strict=True))
    assert set(passages) == set(expected)  # segments may come in another order
    for passage, memory in zip(passages, memories, strict=True):
        np.testing.assert_array_equal(memory, expected[passage])


def test_all_devices_make_the_same_store(tmp_path, loaded):
    """If this broke, a store would depend on the machine that made it."""
    names = corpus(tmp_path / "c.jsonl", FIVE)
    index_corpus(loaded, str(tmp_path / "one"), names, SMALL)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    index_corpus(load_model(MODEL, mesh=mesh), str(tmp_path / "four"), names, SMALL, mesh)
    (a, b), (c, d) = everything(tmp_path / "one"), everything(tmp_path / "four")
    assert a == c
    np.testing.assert_allclose(b, d, rtol=2**-7, atol=1e-6)  # one step of bfloat16 where rounding falls otherwise


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no documents"),
        (b'{"id": "a", "text": "  \\n"}\n', r"holds no documents \(left out 1 documents without text"),
        (
            b'{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}\n',
            "the id 'a' is that of two documents: .*line 1.*line 2",
        ),
        (b'{"id": "a", "text": "x"}\n{"id": "b", "text": "\xff"}\n', r"line 2: .*--on_bad skip"),
        (b'{"id": "a", "txt": "x"}\n', "line 1: field 'text' is missing"),
    ],
)
def test_a_bad_corpus_is_refused_before_anything_is_compressed(tmp_path, loaded, monkeypatch, content, message):
    """If this broke, hours of compressing would end in an error about the last line."""
    path = tmp_path / "c.jsonl"
    path.write_bytes(content)
    monkeypatch.setattr("clara_jax.indexing._Making.all_segments", lambda *_: pytest.fail("compressed before checking"))
    with pytest.raises(UserError, match=message):
        index_corpus(loaded, str(tmp_path / "store"), [str(path)], SMALL)
    assert not (tmp_path / "store").exists()


def test_what_is_left_out_is_said(tmp_path, loaded):
    """Blank documents, and with `skip` bad ones, are counted with the place of the first: nothing vanishes silently."""
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"id": "a", "text": "x"}\n{"id": "b", "text": " "}\n{"id": "c", "text": "\xff"}\n')
    indexed = index_corpus(loaded, str(tmp_path / "s"), [str(path)], dataclasses.replace(SMALL, on_bad="skip"))
    assert indexed.store.documents == 1
    assert [remark.split(":")[0] for remark in indexed.remarks] == [
        "left out 1 documents without text, the first",
        "left out 1 documents that cannot be used, the first",
    ]


def test_a_corpus_that_changes_while_it_is_read(tmp_path, loaded, monkeypatch):
    """Between the two readings: the store must not note the digest of one text with the memories of another."""
    path = tmp_path / "c.jsonl"

    class Changing(CountProgress):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            corpus(path, later)

    monkeypatch.setattr("clara_jax.indexing.CountProgress", Changing)
    for later, message in (
        ([("d0", "", "x"), *FIVE[1:]], "line 1 has changed while the corpus was read"),
        (FIVE[1:], "1 documents have vanished from the corpus"),
    ):
        with pytest.raises(UserError, match=message):
            index_corpus(loaded, str(tmp_path / "s"), corpus(path, FIVE), SMALL)


def test_settings_that_make_no_sense():
    """A mistyped option is named."""
    with pytest.raises(UserError, match="segment is 0"):
        IndexConfig(segment=0)
    with pytest.raises(UserError, match="overlap is -1"):
        IndexConfig(overlap=-1)


def test_long_documents_make_segments_of_few():
    """If this broke, a corpus of books would be held in memory a thousand at a time."""
    book, note = Document("b", "", "x" * 9000, ""), Document("n", "", "x", "")
    sizes = [len(group) for group in _groups(iter([book, note, note, note, book, book, note]), 2)]
    assert sizes == [1, 2, 2, 1, 1]
