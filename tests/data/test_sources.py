"""Sources: any file, folder or id gives its records, or says in one line what is wrong and where."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clara_jax.data import sources
from clara_jax.data.records import parse_record
from clara_jax.data.sources import BadRecords, open_source
from clara_jax.errors import UserError
from tests.data.examples import GOOD, LIST, PARAPHRASE, SINGLE, changed, read_records, write_lines

BAD_LINES = {
    "cut off": (b'{"docs": ["a"', "the line is not JSON"),
    "not UTF-8": (b'{"question": "\xff", "answer": "a", "docs": ["d"]}', "the line is not UTF-8"),
    "UTF-16": ('{"docs": []}'.encode("utf-16"), "the line is not UTF-8"),
    "two records in a line": (b"{} {}", "the line is not JSON"),
    "byte order mark": (b"\xef\xbb\xbf{}", "the line is not JSON"),
    "a number too long": (b"9" * 5000, "the line is not JSON"),
    "deep nesting": (b"[" * 200_000, "the line is not JSON"),
    "NaN": (b'{"question": NaN, "answer": "a", "docs": ["d"]}', "field 'question' must be a text, not nan"),
    "escaped surrogate": (b'{"question": "\\ud800", "answer": "a", "docs": ["d"]}', "field 'question' holds a lone"),
    "a field": (json.dumps(changed(SINGLE, docs=3)).encode(), "field 'docs' must be a list of texts, not 3"),
    "a huge text": (json.dumps(changed(SINGLE, docs="x" * 5_000_000)).encode(), "field 'docs' must be a list of texts"),
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_stops_with_file_line_and_reason(line, reason, tmp_path):
    """Hours of preparation would end in a traceback that does not say where to look."""
    path = write_lines(tmp_path / "data.jsonl", SINGLE, b"  ", line, LIST)  # blank lines count as lines
    with pytest.raises(UserError) as error:
        read_records(path)
    assert str(error.value).startswith(f"{path}, line 3: {reason}")
    assert "data.on_bad_record" in str(error.value)


@pytest.mark.parametrize("depth", [50, 300, 600, 900, 950, 980, 990, 995, 1000, 3000])
def test_nesting_of_any_depth_is_refused(depth, tmp_path):
    """Showing the value in the message recurses too: some depths pass the JSON parser and break the message."""
    line = b'{"question": "q", "answer": "a", "docs": ' + b"[" * depth + b"]" * depth + b"}"
    with pytest.raises(UserError, match="line 1"):
        read_records(write_lines(tmp_path / "data.jsonl", line))


def test_skip_counts_and_keeps_the_order(tmp_path):
    """Skipped lines would be lost without a number to judge them by."""
    bad = [line for line, _ in BAD_LINES.values()]
    path = write_lines(tmp_path / "data.jsonl", bad[0], SINGLE, *bad[1:], b"", LIST, b"\t", PARAPHRASE)
    records, skipped = read_records(path, "skip")
    assert records == [parse_record(record) for record in (SINGLE, LIST, PARAPHRASE)]
    assert skipped == len(bad)
    assert read_records(write_lines(tmp_path / "good.jsonl", *GOOD)) == ([parse_record(r) for r in GOOD], 0)


def test_the_first_reason_is_kept():
    """The report on skipped records would show some other record than the first."""
    bad = BadRecords("data", "skip")
    for number in range(3):
        bad.add(f"line {number}", sources.FieldError("no"))
    assert (bad.count, bad.first) == (3, "line 0: no")


def test_line_ends_inside_texts_and_of_other_systems(tmp_path):
    """Unicode's own line separators in a text must not cut it; files from Windows must load."""
    record = changed(SINGLE, question="a\u2028b\u0085c\rd\x0be\x00f")
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(record, ensure_ascii=False).encode() + b"\r\n" + json.dumps(LIST).encode())
    records, _ = read_records(path)
    assert records[0].questions == (record["question"],)
    assert len(records) == 2


ROWS = [LIST | {"question": None, "data_type": "paraphrase"}, PARAPHRASE, changed(SINGLE, answers=None)] * 700
COLUMNS = pa.schema(
    [
        *[(name, pa.string()) for name in ("data_type", "question", "answer")],
        *[(name, pa.list_(pa.string())) for name in ("answers", "docs")],
        ("pos_index", pa.list_(pa.int64())),
        ("meta", pa.struct([("anything", pa.float32())])),
    ]
)


def saved_in_every_form(folder, rows=ROWS):
    """The rows as lines, Parquet, and Hugging Face folders, by name."""
    table = pa.Table.from_pylist(rows, COLUMNS)
    write_lines(folder / "rows.jsonl", *rows)
    write_lines(folder / "rows.json", *rows)
    pq.write_table(table, folder / "rows.parquet")
    dataset = datasets.Dataset(table)
    dataset.save_to_disk(folder / "saved")
    datasets.DatasetDict({"train": dataset, "dev": dataset.select(range(1))}).save_to_disk(folder / "splits")
    (folder / "files").mkdir()
    pq.write_table(table, folder / "files" / "train.parquet")
    return [
        str(folder / name)
        for name in ("rows.jsonl", "rows.json", "rows.parquet", "saved", "splits", "splits:train", "files")
    ]


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Datasets keeps what it converts; the tests must not fill the user's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub_cache")


def test_every_form_gives_the_same_records(tmp_path, hub_cache):
    """The same data would train another model when stored in another way."""
    expected = [parse_record(row) for row in ROWS]
    for name in saved_in_every_form(tmp_path):
        assert read_records(name) == (expected, 0), name
    assert read_records(f"{tmp_path / 'splits'}:dev") == (expected[:1], 0)


def test_fingerprints_follow_the_content(tmp_path, hub_cache):
    """Changed data would be taken from the cache of tokens as it was before."""
    before = [open_source(name).fingerprint for name in saved_in_every_form(tmp_path)]
    again = [open_source(f"{name}").fingerprint for name in (tmp_path / "rows.jsonl", tmp_path / "saved")]
    assert again == [before[0], before[3]]
    other = tmp_path / "other"
    other.mkdir()
    after = [
        open_source(name).fingerprint
        for name in saved_in_every_form(other, [*ROWS[:-1], changed(ROWS[-1], answer="B")])
    ]
    assert not set(before) & set(after)


def test_bad_rows_of_a_table_are_named_by_row(tmp_path, hub_cache):
    """A Parquet file has no lines to look at, and one text that is not UTF-8 would hide all other rows."""
    texts = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.array([0, 1, 2, 3], pa.int32()).buffers()[1], pa.py_buffer(b"a\xffb")]
    )
    table = pa.table({"question": texts, "answer": ["a", "b", None], "docs": [["d"]] * 3})
    pq.write_table(table, tmp_path / "rows.parquet")
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    for name in (tmp_path / "rows.parquet", tmp_path / "saved"):
        with pytest.raises(UserError, match=r"row 1 \(from 0\): the row holds a text that is not UTF-8"):
            read_records(name)
        records, skipped = read_records(name, "skip")
        assert ([record.questions for record in records], skipped) == ([("a",)], 2)


def test_tables_without_the_columns(tmp_path, hub_cache):
    """Any dataset of the hub may be named: it must be refused by the field that is missing."""
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "rows.parquet")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    for name in (tmp_path / "rows.parquet", tmp_path / "saved"):
        with pytest.raises(UserError, match=r"row 0.*field 'docs' is missing"):
            read_records(name)


def test_sources_that_are_not_there(tmp_path, hub_cache, monkeypatch):
    """A mistyped path would end in a traceback, or in a minute of retries over the network."""
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    (tmp_path / "table.csv").write_text("a,b")
    (tmp_path / "half.parquet").write_bytes(b"PAR1 and then nothing")
    saved_in_every_form(tmp_path)
    for name, reason in {
        "no.jsonl": "there is no such file or folder",
        "deep/down/no": "there is no such file or folder",
        "table.csv": r"unknown kind.*\.jsonl.*\.parquet",
        "half.parquet": "not a whole Parquet file",
        "splits:test": "no split test.*train, dev",
        "saved:test": "a single dataset",
    }.items():
        with pytest.raises(UserError, match=reason):
            read_records(tmp_path / name)


def test_the_hub(monkeypatch, hub_cache):
    """A run on a machine without network must say so in one line; the split must be the one asked for."""
    asked = []

    def load(place, split):
        asked.append((place, split))
        if place == "far/away":
            raise ConnectionError("Couldn't reach\nthe Hub")
        return datasets.Dataset.from_list([SINGLE], split=split)

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in ("some/data", "some/data:dev", "some/data:train[:10%]"):
        assert read_records(name)[0] == [parse_record(SINGLE)]
    assert asked == [("some/data", "train"), ("some/data", "dev"), ("some/data", "train[:10%]")]
    with pytest.raises(UserError, match=r"far/away.*hub \(ConnectionError: Couldn't reach the Hub\).*network"):
        open_source("far/away")
