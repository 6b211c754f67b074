"""The ask command, and Clara.answer below it: answers with their sources, from one store or several."""

import dataclasses
import io
import json
import sys

import numpy as np
import pytest

from clara_jax import Clara, ask
from clara_jax.errors import UserError
from clara_jax.indexing import IndexConfig, index_corpus
from clara_jax.retrieval.store import MemoryStore
from clara_jax.training.runs import load_model
from tests.test_indexing import MODEL, corpus

DOCUMENTS = [
    ("mill", "The mill", "It stands north of the river. Ada built it."),
    ("b", "", "Bread."),
    ("c", "", "Ada."),
]


@pytest.fixture(scope="module")
def clara():
    return Clara(load_model(MODEL))


@pytest.fixture(scope="module")
def stores(clara, tmp_path_factory):
    """Two stores: three documents, and one."""
    folder = tmp_path_factory.mktemp("stores")
    for name, documents in (("one", DOCUMENTS), ("two", [("far", "Far", "Away.")])):
        names = corpus(folder / f"{name}.jsonl", documents)
        index_corpus(clara.loaded, str(folder / name), names, IndexConfig(overlap=8))
    return [folder / "one", folder / "two"]


def run(monkeypatch, capsys, stores, *options, stdin=""):
    """What the command prints."""
    names = [f"--store={store}" for store in stores]
    monkeypatch.setattr(sys, "argv", ["ask", f"--model={MODEL}", *names, "--max_new_tokens=4", *options])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    ask.main()
    return capsys.readouterr().out


def test_answers_name_their_sources(clara, stores):
    """If this broke, an answer would be shown beside passages that it was not made from."""
    index = clara.open_stores(*stores)
    question = "Who built the mill?"
    (answer,) = clara.answer(question, index, k=2, max_new_tokens=5)
    contents = [f"{title}\n{text}" if title else text for _, title, text in (*DOCUMENTS, ("far", "Far", "Away."))]
    memories = np.asarray(clara.compress(contents)).reshape(4, -1)
    query = np.asarray(clara.encode_query(question)).reshape(-1)
    cosines = memories @ query / np.linalg.norm(memories, axis=1) / np.linalg.norm(query)
    best = np.argsort(-cosines)[:2]
    assert [source.document for source in answer.sources] == [["mill", "b", "c", "far"][n] for n in best]
    np.testing.assert_allclose([s.score for s in answer.sources], cosines[best], atol=2**-8)  # bfloat16 memories
    assert all(
        source.text == {d: t for d, _, t in (*DOCUMENTS, ("far", "", "Away."))}[source.document]
        for source in answer.sources
    )
    given = clara.generate([question], clara.compress([contents[n] for n in best])[None], 5)
    assert answer.text == given.texts[0]
    assert set(answer.seconds) == {"encode", "search", "read", "generate"} and not answer.question_cut


def test_edge_cases_of_answering(clara, stores, tmp_path):
    """Each is defined: nothing is cut, repeated or left out silently."""
    assert len(clara.answer("Who?", stores[0], k=50, max_new_tokens=2)[0].sources) == 3  # all that there are
    assert clara.answer("Who? " * 30, stores[0], k=1, max_new_tokens=2)[0].question_cut
    with pytest.raises(UserError, match="a question is blank"):
        clara.answer([" \n"], stores[0])
    with pytest.raises(UserError, match=r"question that begins with 'why why.*at most 1024 are read"):
        clara.answer("why " * 2000, stores[0])
    opened = MemoryStore.open(stores[0])
    another = dataclasses.replace(opened.manifest, settings=dataclasses.replace(opened.settings, compressor="x"))
    with pytest.raises(UserError, match="memories of another compressor"):  # a store that is open already too
        clara.answer("Who?", MemoryStore(opened.objects, another))
    with pytest.raises(UserError, match="k is 0"):
        clara.answer("Who?", stores[0], k=0)
    with pytest.raises(UserError, match="holds no memory store"):
        clara.answer("Who?", tmp_path)


def test_a_question(monkeypatch, capsys, stores):
    """Answer, passages with score, document and span, timings."""
    said = run(monkeypatch, capsys, stores[:1], "Who?", "--k=2")
    assert "\n1. 0." in said and "\n2. " in said and f"of {stores[0]}" in said and "generate" in said
    found = json.loads(run(monkeypatch, capsys, stores, "Who?", "--k=4", "--json"))
    assert {source["document"] for source in found["sources"]} == {"mill", "b", "c", "far"}
    assert all({"start", "end", "text", "score", "store"} <= source.keys() for source in found["sources"])


def test_a_first_pass_gives_the_same_sources(monkeypatch, capsys, clara, stores):
    """With as many candidates as there are memories it changes nothing; with fewer than k it is refused."""
    exact = json.loads(run(monkeypatch, capsys, stores, "Who?", "--k=3", "--json"))
    found = json.loads(run(monkeypatch, capsys, stores, "Who?", "--k=3", "--json", "--first_pass=4"))
    assert found["text"] == exact["text"]
    assert [s["document"] for s in found["sources"]] == [s["document"] for s in exact["sources"]]
    with pytest.raises(UserError, match="candidates"):
        clara.answer("Who?", clara.open_stores(*stores, first_pass=1), k=3)


def test_questions_one_after_the_other(monkeypatch, capsys, stores):
    """Without a question, each line of input is one; a mistake does not end the conversation."""
    said = run(monkeypatch, capsys, stores, "--json", "--k=1", stdin="Who?\n\n" + "why " * 2000 + "\nWhere?\n")
    assert [json.loads(line)["question"] for line in said.splitlines()] == ["Who?", "Where?"]


def test_a_file_of_questions(monkeypatch, capsys, stores, tmp_path):
    """A line of JSON for each, in order, under its id; the file appears only when it is complete."""
    questions, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    rows = [{"question": f"Who built mill {n}?"} for n in range(18)] + [{"id": "last", "question": "Why?"}]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(monkeypatch, capsys, stores, f"--questions={questions}", f"--out={out}", "--k=1")
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in found] == [*(str(n) for n in range(1, 19)), "last"]
    assert [row["question"] for row in found] == [row["question"] for row in rows]
    questions.write_text(json.dumps({"question": " "}) + "\n")
    with pytest.raises(UserError, match="question"):
        run(monkeypatch, capsys, stores, f"--questions={questions}", f"--out={tmp_path / 'b.jsonl'}")
    assert not (tmp_path / "b.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["Who?", "--k=0"], "--k is 0"),
        (["Who?", "--temperature=-1"], "temperature is -1"),
        (["Who?", "--questions=x"], "both a question and --questions"),
        (["--questions=nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["Who?", "--store=nowhere"], "nowhere holds no memory store"),
        (["Who?", "--model=nowhere"], "nowhere is neither a run directory"),
    ],
)
def test_mistakes_are_named(monkeypatch, capsys, stores, options, message):
    """A wrong option is one line that says which."""
    with pytest.raises(UserError, match=message):
        run(monkeypatch, capsys, stores, *options)
