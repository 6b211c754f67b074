"""The inspect command as a user gives it."""

import csv
import json
import sys

import pytest

from clara_jax import inspect
from clara_jax.errors import run_command
from tests.conftest import FIXTURES

MODEL = str(FIXTURES / "mistral_window" / "ckpt_stage2")


def run(monkeypatch, capsys, *options):
    """Its exit status, and what it says on standard output and on standard error."""
    monkeypatch.setattr(sys, "argv", ["inspect", *map(str, options)])
    with pytest.raises(SystemExit) as ended:
        run_command(inspect.main)
    return ended.value.code, *capsys.readouterr()


def test_lens_prints_a_table_or_json(monkeypatch, capsys, tmp_path):
    """Questions go to the query reasoner, documents and files to the compressor, all in one call."""
    (tmp_path / "d.txt").write_text("The city lies on a river. " * 50)
    options = ("lens", "Who wrote it?", "--model", MODEL, "--document_file", tmp_path / "d.txt", "--top", 2)
    status, said, _ = run(monkeypatch, capsys, *options)
    assert status == 0 and "query_reasoner: Who wrote it?" in said and "<MEM0>" in said and "(cut: " in said
    status, said, _ = run(monkeypatch, capsys, *options, "--json")
    question, document = map(json.loads, said.splitlines())
    assert status == 0 and (question["role"], document["role"]) == ("query_reasoner", "compressor")
    assert len(question["memory"][0]["decoded"]) == 2 and not question["cut"] and document["cut"]


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_map_writes_png_and_csv(monkeypatch, capsys, tmp_path, method):
    """Both files, and the figures that say what the picture shows."""
    texts = ["A city", "The river", "It is a book", "She wrote it"]
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps({"id": f"d{n}", "text": t}) + "\n" for n, t in enumerate(texts)))
    out = tmp_path / "map.png"
    options = ("map", "--model", MODEL, "--corpus", corpus, "--out", out, "--method", method)
    status, said, errors = run(monkeypatch, capsys, *options)
    assert status == 0, errors
    assert "mean cosine" in said and "mean distance" in said
    assert ("of the variance" in said) == (method == "pca")
    assert out.read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "map.csv").open() as file:
        assert [row["id"] for row in csv.DictReader(file)] == ["d0", "d1", "d2", "d3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["lens"], "nothing to look at"),
        (["lens", " "], "is blank"),
        (["lens", "Who?", "--top", "0"], "--top is 0"),
        (["lens", "--document_file", "missing.txt"], "missing.txt cannot be read"),
        (["map", "--corpus", "missing.jsonl", "--out", "no/such/folder/map.png"], "no/such/folder/map.png"),
    ],
)
def test_refusals_are_one_line(monkeypatch, capsys, options, message):
    """A mistake costs one line and no loading of a model: here its name is wrong too."""
    status, said, errors = run(monkeypatch, capsys, *options, "--model", "no_model")
    assert status == 2 and not said
    assert message in errors and errors.count("\n") == 1


@pytest.mark.parametrize("package", ["matplotlib", "sklearn"])
def test_missing_packages_name_the_extra(monkeypatch, capsys, tmp_path, package):
    """Without the extra the user must be told what to install."""
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("A city", "The river", "A book")))
    for name in [package, *(n for n in sys.modules if n.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    options = ("map", "--model", MODEL, "--corpus", corpus, "--out", tmp_path / "m.png", "--method", "tsne")
    status, _, errors = run(monkeypatch, capsys, *options)
    assert status == 2 and "clara_jax[evaluate]" in errors
