"""Documents: every kind of source gives the same documents, and what is wrong is named with its place."""

import json
import shutil
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clara_jax.corpus import documents
from clara_jax.corpus.documents import Document, Reading, read_documents
from clara_jax.errors import UserError
from tests.data.examples import write_lines

ROWS = [{"id": "a", "title": "Ada", "text": "Ada wrote it."}, {"id": "b", "title": None, "text": "Bob read it."}]
FOUND = [("a", "Ada", "Ada wrote it."), ("b", "", "Bob read it.")]


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch):
    """Datasets keeps what it converts; the tests must not fill the user's folder, nor ask the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub_cache")


def read(*names, on_bad="stop", reading=None):
    found = list(read_documents([str(name) for name in names], on_bad, reading))
    return [(document.id, document.title, document.text) for document in found]


def refusal(*names, on_bad="stop"):
    with pytest.raises(UserError) as error:
        read(*names, on_bad=on_bad)
    return str(error.value)


def test_every_form_of_table_gives_the_same_documents(tmp_path):
    """The same corpus would have other ids, or none, when it is stored in another way."""
    folder = tmp_path / "forms"
    folder.mkdir()
    table = pa.Table.from_pylist(ROWS)
    write_lines(folder / "rows.jsonl", *ROWS)
    write_lines(folder / "rows.json", *ROWS)
    pq.write_table(table, folder / "rows.parquet")
    datasets.Dataset(table).save_to_disk(folder / "saved")
    datasets.DatasetDict({"train": datasets.Dataset(table)}).save_to_disk(folder / "splits")
    (folder / "files").mkdir()
    pq.write_table(table, folder / "files" / "train.parquet")
    for name in ("rows.jsonl", "rows.json", "rows.parquet", "saved", "splits", "splits:train", "files"):
        assert read(folder / name) == FOUND, name


def test_the_hub(monkeypatch):
    """A data set of the hub must be read by the split asked for, or be refused in one line."""

    def load(place, split):
        if place == "far/away":
            raise ConnectionError("Couldn't reach the Hub")
        return datasets.Dataset.from_list([{"passage": split}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("some/data", "some/data:dev") == [("data:0", "", "train"), ("data:dev:0", "", "dev")]
    assert "far/away is neither" in (text := refusal("far/away")) and "Couldn't reach the Hub" in text


def test_the_names_of_fields(tmp_path):
    """BEIR, Pyserini and FlashRAG name the same fields differently."""
    path = write_lines(
        tmp_path / "corpus.jsonl",
        {"_id": "1", "title": "T", "text": "beir", "metadata": {}},
        {"docid": 2, "contents": "pyserini"},
        {"id": "3", "_id": "no", "passage": "p", "text": None},
        b"",
        {"text": "last"},
    )
    assert read(path) == [
        ("1", "T", "beir"),
        ("2", "", "pyserini"),
        ("3", "", "p"),
        ("corpus.jsonl:5", "", "last"),
    ]


def test_places_are_named(tmp_path):
    """Messages of later steps say where a document stands."""
    path = write_lines(tmp_path / "corpus.jsonl", b"", *ROWS)
    assert [document.where for document in read_documents([str(path)])] == [f"{path}, line 2", f"{path}, line 3"]


BAD_ROWS = {
    "not JSON": (b"{", "the line is not JSON"),
    "not UTF-8": (b'{"text": "\xff"}', "the line is not UTF-8"),
    "no object": (b"[1]", "the document must be a JSON object, not a list"),
    "no text": ({"id": "x"}, "field 'text' is missing (or 'contents', or 'passage')"),
    "text is a number": ({"text": 3}, "field 'text' must be a text, not an integer"),
    "text is nested": ({"contents": [["x"]]}, "field 'contents' must be a text, not a list"),
    "title is a list": ({"title": ["x"], "text": "x"}, "field 'title' must be a text, not a list"),
    "id is a number with a point": ({"id": 1.5, "text": "x"}, "field 'id' must be a text or an integer, not a number"),
    "id is true": ({"_id": True, "text": "x"}, "field '_id' must be a text or an integer, not true or false"),
    "id is empty": ({"docid": " ", "text": "x"}, "field 'docid' must be a text or an integer, not an empty text"),
    "lone surrogate": (b'{"text": "\\ud800"}', "field 'text' holds a lone surrogate"),
}


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_are_named(row, reason, tmp_path):
    """A corpus of millions would end in a traceback that does not say where to look."""
    path = write_lines(tmp_path / "corpus.jsonl", ROWS[0], row, ROWS[1])
    text = refusal(path)
    assert text.startswith(f"{path}, line 2: {reason}") and "on_bad" in text
    reading = Reading()
    assert read(path, on_bad="skip", reading=reading) == FOUND
    assert (reading.documents, reading.bad) == (2, 1)
    assert reading.remarks()[0].startswith(f"left out 1 documents that cannot be used, the first: {path}, line 2: ")


def test_documents_of_white_space(tmp_path):
    """They would become memories of nothing, which any question may find."""
    path = write_lines(tmp_path / "corpus.jsonl", ROWS[0], {"text": " \n\u3000"}, ROWS[1], {"id": "a", "text": ""})
    reading = Reading()
    assert read(path, reading=reading) == FOUND
    assert reading.remarks() == [f"left out 2 documents without text, the first: {path}, line 2"]
    assert (reading.documents, reading.blank) == (2, 2)


def test_an_empty_corpus(tmp_path):
    """A store of nothing would be found out at the first question."""
    empty = write_lines(tmp_path / "empty.jsonl", b"")
    blank = write_lines(tmp_path / "blank.jsonl", {"text": " "})
    assert "no documents" in refusal(empty)
    assert f"left out 1 documents without text, the first: {blank}, line 1" in refusal(empty, blank)
    with pytest.raises(UserError, match="no sources"):
        read_documents([])


@pytest.mark.parametrize("on_bad", ["stop", "skip"])
def test_an_id_twice(on_bad, tmp_path):
    """Deleting or changing a document by its id would hit another one."""
    one = (
        write_lines(tmp_path / "one.jsonl", b"{", *ROWS)
        if on_bad == "skip"
        else write_lines(tmp_path / "one.jsonl", *ROWS)
    )
    line = 3 if on_bad == "skip" else 2
    two = write_lines(tmp_path / "two.jsonl", {"id": "c", "text": "x"}, {"docid": "b", "text": "y"})
    assert refusal(one, two, on_bad=on_bad).startswith(
        f"the id 'b' is that of two documents: {one}, line {line}, and {two}, line 2."
    )
    assert "is that of two documents" in refusal(two, two, on_bad=on_bad)


def test_equal_hashes_are_not_equal_ids(tmp_path, monkeypatch):
    """Among billions of ids two hashes may be equal by chance; that must not refuse a corpus."""
    monkeypatch.setattr(documents, "hash", lambda text: 0, raising=False)
    assert read(write_lines(tmp_path / "corpus.jsonl", *ROWS)) == FOUND
    assert "two documents" in refusal(write_lines(tmp_path / "twice.jsonl", *ROWS, ROWS[0]))


def test_a_folder_of_texts(tmp_path):
    """Notes and manuals have neither ids nor titles but their paths and headings."""
    folder = tmp_path / "notes"
    (folder / "deep" / "down").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "hidden.md").write_text("# no")
    (folder / "b.TXT").write_bytes("\ufeff# no heading\r\nline".encode())
    (folder / "deep" / "a.md").write_text("\nIntro\n\n## The title ##\n# second\n")
    (folder / "deep" / "down" / "c.md").write_text("#no heading")
    (folder / "deep" / "blank.md").write_text(" \n")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    reading = Reading()
    assert read(folder, reading=reading) == [
        ("b.TXT", "b", "# no heading\r\nline"),
        ("deep/a.md", "The title", "\nIntro\n\n## The title ##\n# second\n"),
        ("deep/down/c.md", "c", "#no heading"),
    ]
    assert reading.remarks() == [
        f"left out 1 documents without text, the first: {folder / 'deep' / 'blank.md'}",
        f"left out 1 files that are neither .txt nor .md, the first: {folder / 'picture.png'}",
    ]
    assert read(folder / "deep" / "a.md")[0][:2] == ("a.md", "The title")
    shutil.copytree(folder, tmp_path / "copy")
    assert "'b.TXT' is that of two documents" in refusal(folder, tmp_path / "copy")


def test_texts_that_are_not_utf_8(tmp_path):
    """The line is what an editor can go to."""
    (tmp_path / "notes").mkdir()
    path = tmp_path / "notes" / "latin.txt"
    path.write_bytes(b"one\ntwo\nna\xefve\n")
    (tmp_path / "notes" / "zoo.txt").write_text("fine")
    assert refusal(tmp_path / "notes").startswith(f"{path}: line 3 is not UTF-8.")
    assert read(tmp_path / "notes", on_bad="skip") == [("zoo.txt", "zoo", "fine")]


def test_sources_that_are_none(tmp_path):
    """A mistyped path must be refused before hours of compression, not after."""
    (tmp_path / "table.csv").write_text("a,b")
    (tmp_path / "half.parquet").write_bytes(b"PAR1 and then nothing")
    (tmp_path / "no_text.parquet").touch()
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "no_text.parquet")
    datasets.Dataset.from_dict({"body": ["x"]}).save_to_disk(tmp_path / "no_column")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "README.md").write_text("x")
    (tmp_path / "both" / "rows.parquet").touch()
    for name, reason in {
        "no.jsonl": "there is no such file or folder",
        "deep/down/no": "there is no such file or folder",
        "table.csv": "file of unknown kind",
        "half.parquet": "not a whole Parquet file",
        "no_text.parquet": "row 0 (from 0): field 'text' is missing",
        "no_column": "row 0 (from 0): field 'text' is missing",
        "nothing": "holds no .txt or .md file and no data set",
        "both": "holds texts (README.md) and tables (rows.parquet)",
    }.items():
        assert reason in refusal(tmp_path / name), name
    good = write_lines(tmp_path / "good.jsonl", *ROWS)
    with pytest.raises(UserError, match="no such file"):
        read_documents([str(good), str(tmp_path / "no.jsonl")])


def test_a_document_of_10_mb(tmp_path):
    """Books and logs come as one document; the end must be there."""
    text = "x" * 10_000_000 + " end"
    path = write_lines(tmp_path / "corpus.jsonl", {"id": "long", "text": text}, ROWS[0])
    (tmp_path / "long.txt").write_text(text)
    found = read(path, tmp_path / "long.txt")
    assert [(name, len(body)) for name, _, body in found] == [("long", len(text)), ("a", 13), ("long.txt", len(text))]


def test_a_corpus_is_never_whole_in_memory(tmp_path):
    """Wikipedia does not fit."""
    path = tmp_path / "corpus.jsonl"
    with path.open("w") as file:
        for number in range(2000):
            file.write(json.dumps({"id": number, "text": "x" * 10_000}) + "\n")
    tracemalloc.start()
    count = sum(isinstance(document, Document) for document in read_documents([str(path)]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 2000 and peak < 2_000_000
