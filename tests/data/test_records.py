"""Training records: whatever a line holds, it is taken unchanged or refused by file, line and field."""

import copy
import json
import random

import pytest

from clara_jax.data.records import FieldError, Record, parse_record, read_jsonl
from clara_jax.errors import UserError

LIST = {"data_type": "qa", "question": ["Who?", "When?"], "answers": ["Ada", "1843"], "docs": ["Ada wrote it."]}
PARAPHRASE = {"data_type": "paraphrase", "answers": ["Said anew."], "docs": ["Said."]}
SINGLE = {"question": "Who?", "answer": "Ada", "docs": ["Ada.", "Bob.", ""], "pos_index": [2, 0]}
GOOD = (LIST, PARAPHRASE, SINGLE)


def test_the_three_formats():
    """Published training data would not load."""
    assert parse_record(LIST) == Record(("Ada wrote it.",), ("Who?", "When?"), ("Ada", "1843"), "qa", True, None)
    assert parse_record(PARAPHRASE) == Record(("Said.",), (), ("Said anew.",), "paraphrase", False, None)
    assert parse_record(SINGLE) == Record(("Ada.", "Bob.", ""), ("Who?",), ("Ada",), "qa", False, (2, 0))


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"answer": "a", "answers": ["b"], "golden_answers": ["c"]}, ("a",)),
        ({"answers": ["b", "d"], "golden_answers": ["c"]}, ("b", "d")),
        ({"golden_answers": ["c", "e"]}, ("c", "e")),
        ({"answer": None, "answers": None, "golden_answers": ["c"]}, ("c",)),
    ],
)
def test_where_the_answer_is_looked_for(answers, expected):
    """Another field would win than in the reference, and the model learn another answer."""
    assert parse_record({"question": "Who?", "docs": ["d"], **answers}).answers == expected


def changed(record, **fields):
    return {key: value for key, value in (record | fields).items() if value is not ...}


@pytest.mark.parametrize(
    ("record", "named"),
    [
        (None, "JSON object"),
        ([LIST], "JSON object"),
        ("text", "JSON object"),
        (7, "JSON object"),
        (changed(LIST, data_type="quiz"), '\'data_type\'.*"qa" or "paraphrase".*quiz'),
        (changed(LIST, data_type=None), "'data_type'"),
        (changed(LIST, data_type=["qa"]), "'data_type'"),
        (changed(LIST, docs=...), "'docs' is missing"),
        (changed(LIST, docs=[]), "'docs' must be at least one text"),
        (changed(LIST, docs="one text"), "'docs' must be a list of texts.*one text"),
        (changed(LIST, docs=["a", 3]), "'docs' must be a list of texts"),
        (changed(LIST, docs=[["a"]]), "'docs' must be a list of texts"),
        (changed(LIST, docs=[None]), "'docs'"),
        (changed(LIST, docs=float("nan")), "'docs'.*nan"),
        (changed(LIST, docs=["a\ud800"]), "'docs' holds a lone surrogate"),
        (changed(LIST, question=...), "'question' is missing"),
        (changed(LIST, question=["a", None]), "'question' must be a list of texts"),
        (changed(LIST, question=["a", "\udfff"]), "'question' holds a lone surrogate"),
        (changed(LIST, question=["only one"]), "'question' has 1 texts and its answers 2"),
        (changed(LIST, question=[], answers=["a"]), "'question' has 0 texts"),
        (changed(LIST, question={"text": "a"}), "'question' must be a text"),
        (changed(SINGLE, question=None), "'question' must be a text"),
        (changed(SINGLE, question="\ud83d"), "'question' holds a lone surrogate"),
        (changed(SINGLE, answer=...), "'answer' is missing"),
        (changed(SINGLE, answer=3), "'answer' must be"),
        (changed(SINGLE, answer=True), "'answer' must be"),
        (changed(SINGLE, answer="\udc00"), "'answer' holds a lone surrogate"),
        (changed(SINGLE, answer=None, answers=[]), "'answers' must be at least one text"),
        (changed(SINGLE, answer=None, answers="a"), "'answers' must be a list of texts"),
        (changed(SINGLE, answer=None, golden_answers=[1.5]), "'golden_answers' must be a list of texts"),
        (changed(SINGLE, pos_index=2), "'pos_index' must be a list of integers"),
        (changed(SINGLE, pos_index=[True]), "'pos_index' must be a list of integers"),
        (changed(SINGLE, pos_index=[1.0]), "'pos_index' must be a list of integers"),
        (changed(SINGLE, pos_index=["1"]), "'pos_index' must be a list of integers"),
        (changed(SINGLE, pos_index=[0, 3]), "'pos_index' holds 3, and there are 3 docs"),
        (changed(SINGLE, pos_index=[-1]), "'pos_index' holds -1"),
    ],
)
def test_each_field_is_refused_by_name(record, named):
    """A user with a million lines needs to know what is wrong with this one."""
    with pytest.raises(FieldError, match=named) as error:
        parse_record(record)
    assert len(str(error.value)) < 200  # one readable line, whatever the value


def write_lines(path, *lines):
    path.write_bytes(b"\n".join(json.dumps(x).encode() if isinstance(x, dict) else x for x in lines) + b"\n")
    return path


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
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_stops_with_file_line_and_reason(line, reason, tmp_path):
    """Hours of preparation would end in a traceback that does not say where to look."""
    path = write_lines(tmp_path / "data.jsonl", SINGLE, b"  ", line, LIST)  # blank lines count as lines
    with pytest.raises(UserError) as error:
        read_jsonl(path)
    assert str(error.value).startswith(f"{path}, line 3: {reason}")
    assert "data.on_bad_record" in str(error.value)


@pytest.mark.parametrize("depth", [50, 300, 600, 900, 950, 980, 990, 995, 1000, 3000])
def test_nesting_of_any_depth_is_refused(depth, tmp_path):
    """Showing the value in the message recurses too: some depths pass the JSON parser and break the message."""
    line = b'{"question": "q", "answer": "a", "docs": ' + b"[" * depth + b"]" * depth + b"}"
    with pytest.raises(UserError, match="line 1"):
        read_jsonl(write_lines(tmp_path / "data.jsonl", line))


def test_skip_counts_and_keeps_the_order(tmp_path):
    """Skipped lines would be lost without a number to judge them by."""
    bad = [line for line, _ in BAD_LINES.values()]
    path = write_lines(tmp_path / "data.jsonl", bad[0], SINGLE, *bad[1:], b"", LIST, b"\t", PARAPHRASE)
    records, skipped = read_jsonl(path, "skip")
    assert records == [parse_record(record) for record in (SINGLE, LIST, PARAPHRASE)]
    assert skipped == len(bad)
    assert read_jsonl(write_lines(tmp_path / "good.jsonl", *GOOD)) == ([parse_record(r) for r in GOOD], 0)


def test_line_ends_inside_texts_and_of_other_systems(tmp_path):
    """Unicode's own line separators in a text must not cut it; files from Windows must load."""
    record = changed(SINGLE, question="a\u2028b\u0085c\rd\x0be\x00f")
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(record, ensure_ascii=False).encode() + b"\r\n" + json.dumps(LIST).encode())
    assert read_jsonl(path)[0][0].questions == (record["question"],)
    assert len(read_jsonl(path)[0]) == 2


def test_files_without_records(tmp_path):
    """A wrong path or an all-bad file would start a training run on nothing."""
    with pytest.raises(UserError, match=r"no\.jsonl cannot be read .*data\.path"):
        read_jsonl(tmp_path / "no.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        read_jsonl(tmp_path)
    for name, lines, count in (("empty.jsonl", [b""], 0), ("bad.jsonl", [b"{", b"["], 2)):
        with pytest.raises(UserError, match=rf"{name} holds no usable record \({count} bad ones\)"):
            read_jsonl(write_lines(tmp_path / name, *lines), "skip")


ATOMS = [
    None, True, False, 0, -1, 3, 2**70, 1.5, float("nan"), float("inf"), "", "text", "\ud800", "a\x00b", "\u2028",
    [], {}, ["t"], ["t", 1], [["t"]], [None], {"a": "b"}, [0], [9], "qa", "paraphrase",
]  # fmt: skip


def mutate(rng: random.Random):
    """A record with one to three things wrong (or still right) with it."""
    record = copy.deepcopy(rng.choice(GOOD))
    for _ in range(rng.randint(1, 3)):
        if not isinstance(record, dict):
            break
        key = rng.choice([*record, "answer", "answers", "golden_answers", "pos_index", "data_type", "question", "x"])
        value = record.get(key)
        kind = rng.randrange(7)
        if kind == 0:
            record.pop(key, None)
        elif kind == 1:
            record[key] = rng.choice(ATOMS)
        elif kind == 2 and isinstance(value, list) and value:
            value[rng.randrange(len(value))] = rng.choice(ATOMS)
        elif kind == 3 and isinstance(value, list):
            value.insert(rng.randint(0, len(value)), rng.choice(ATOMS))
        elif kind == 4 and isinstance(value, list) and value:
            value.pop()
        elif kind == 5:
            record[key] = [value]
        elif kind == 6 and rng.random() < 0.1:
            record = rng.choice(ATOMS)
    return copy.deepcopy(record)


def texts_of(fields):
    """The texts of a record that was accepted, by the format's description."""
    found = next(fields[k] for k in ("answer", "answers", "golden_answers") if fields.get(k) is not None)
    answers = [found] if isinstance(found, str) else found
    questions = fields["question"] if isinstance(fields.get("question"), list) else [fields.get("question")]
    return fields["docs"], [] if fields.get("data_type") == "paraphrase" else questions, answers


def test_ten_thousand_mutated_records(tmp_path):
    """Some malformed record would raise an exception that nobody catches, or pass with its texts changed."""
    rng = random.Random(20260101)
    mutated = [mutate(rng) for _ in range(10_000)]
    accepted = []
    for fields in mutated:
        before = copy.deepcopy(fields)
        try:
            record = parse_record(fields)
        except FieldError as error:
            assert "field '" in str(error) or "the record" in str(error)
        else:
            accepted.append(record)
            got = list(record.documents), list(record.questions), list(record.answers)
            assert got == tuple(texts_of(before)), before
            assert list(record.positives or ()) == (before.get("pos_index") or [])
            for text in record.documents + record.questions + record.answers:
                text.encode("utf-8")
        assert repr(fields) == repr(before)  # NaN is not equal to itself, its repr is
    assert 2000 < len(accepted) < 8000  # the mutator makes both kinds
    # The same through a file.
    path = write_lines(tmp_path / "data.jsonl", *(json.dumps(fields).encode() for fields in mutated))
    records, skipped = read_jsonl(path, "skip")
    assert records == accepted
    assert skipped == len(mutated) - len(accepted)


def test_ten_thousand_mutated_lines(tmp_path):
    """Damage below JSON (flipped, lost and doubled bytes) would end in another exception, or be lost uncounted."""
    rng = random.Random(7)
    lines = []
    for _ in range(10_000):
        line = bytearray(json.dumps(rng.choice(GOOD), ensure_ascii=rng.random() < 0.5).encode())
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(line))
            kind = rng.randrange(3)
            if kind == 0:
                line[place] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del line[place]
            else:
                line.insert(place, rng.randrange(256))
        lines.append(bytes(line).replace(b"\n", b" "))
    records, skipped = read_jsonl(write_lines(tmp_path / "data.jsonl", *lines), "skip")
    blank = sum(not line.strip() for line in lines)
    assert len(records) + skipped + blank == len(lines)
    assert records and skipped
