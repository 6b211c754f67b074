"""The evaluate command on a real (tiny) model: what it writes, and what it refuses."""

import json
import sys

import pytest

from clara_jax import evaluate
from clara_jax.errors import UserError
from clara_jax.scoring.trec import read_run
from tests.test_indexing import MODEL

RECORDS = [
    {"id": "q 1", "question": "Who built it?", "answer": "Ada", "docs": ["Ada built it.", "Bread."], "pos_index": [0]},
    {"question": "Where is it?", "answer": "north", "docs": ["It is <b>north</b>.", "A river."], "pos_index": [0]},
    {"question": "Is it old?", "answer": "yes", "docs": ["It is old.", "A tower."], "pos_index": [0]},
]  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the command; what it prints."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))

    def command(*options):
        arguments = [f"--model={MODEL}", f"--data={data}", f"--out={tmp_path / 'out'}", "--max_new_tokens=4", *options]
        monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
        evaluate.main()
        return capsys.readouterr().out

    return command


def test_what_is_written(run, tmp_path):
    """Other programs read results.json and the TREC files; people read the report."""
    said = run("--setting=end_to_end", "--k=1", "--pool=all")
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    assert set(results["answers"]) == {"memory", "text", "truncated_text", "no_memory", "wrong_memory"}
    assert all(set(scores) == {"em", "f1", "cover_em"} for scores in results["answers"].values())
    assert {"recall@1", "recall@3", "recall@5", "mrr"} <= set(results["retrieval"]["model"])
    assert results["retrieval"].keys() == {"model", "bm25"} and results["seconds"] > 0
    assert results["intervals"]["answers"].keys() == results["answers"].keys()
    assert results["settings"]["setting"] == "end_to_end" and results["counts"]["documents"] == 6
    rows = [json.loads(line) for line in (out / "questions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["q 1", "2", "3"] and all(len(row["documents"]) == 1 for row in rows)
    ranked = read_run(out / "runs" / "model.trec")
    assert set(ranked) == {"q%201", "2", "3"} and all(len(ranking) == 6 for ranking in ranked.values())
    assert (out / "qrels.txt").read_text().startswith("q%201 0 ")
    html, markdown = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert html.count("data:image/png;base64,") == 2 and "<b>north" not in html
    assert "| wrong_memory |" in markdown and "recall@1" in markdown
    assert "wrong_memory" in said and "3 questions, 3 answered" in said and str(out / "report.html") in said


def test_a_corpus_of_documents(run, tmp_path):
    """The candidates may be a corpus of its own, as for a store."""
    corpus = tmp_path / "c.jsonl"
    corpus.write_text('{"id": "1", "text": "Ada."}\n{"id": "2", "text": "North."}\n')
    said = run(f"--corpus={corpus}", "--systems=memory,no_memory", "--limit=2", "--setting=end_to_end", "--k=2")
    assert "2 questions, 2 answered" in said and "2 documents" in said and "retriever" not in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--systems=memory,magic"], "there is no system magic"),
        (["--k=0"], "k is 0"),
        (["--limit=0"], "limit is 0"),
        (["--max_new_tokens=0"], "max_new_tokens is 0"),
        (["--data=nowhere.json"], "nowhere.json"),
        (["--model=nowhere"], "nowhere is neither a run directory"),
        (["--dense=x"], "--dense x needs the package sentence-transformers"),
        (["--retriever=given", "--pool=all"], "own order"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(run, tmp_path, monkeypatch, options, message):
    """A wrong option is one line that says which, and no half-written folder."""
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match=message):
        run(*options)
    assert not (tmp_path / "out").exists()


def test_results_are_never_overwritten(run, tmp_path):
    """An evaluation that took hours must not vanish under the next one."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("{}")
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        run()
