"""Training records: whatever a line holds, it is taken unchanged or refused by file, line and field."""

import copy
import json
import random

import pytest

from clara_jax.data.records import FieldError, Record, parse_record
from tests.data.examples import GOOD, LIST, PARAPHRASE, SINGLE, changed, read_records, write_lines


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


@pytest.mark.parametrize(
    ("record", "named"),
    [
        (None, "JSON object"),
        ([LIST], "JSON object"),
        ("text", "JSON object"),
        (7, "JSON object"),
        (changed(LIST, data_type="quiz"), '\'data_type\'.*"qa" or "paraphrase".*quiz'),
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
        (changed(SINGLE, question=None), "'question' is missing"),
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


def test_null_is_absent():
    """Rows of a table have every column of every row: a paraphrase row beside question rows would be refused."""
    null = {"question": None, "answer": None, "golden_answers": None, "pos_index": None}
    assert parse_record(null | PARAPHRASE) == parse_record(PARAPHRASE)
    assert parse_record(changed(SINGLE, data_type=None)) == parse_record(SINGLE)


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
    records, skipped = read_records(path, "skip")
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
    records, skipped = read_records(write_lines(tmp_path / "data.jsonl", *lines), "skip")
    blank = sum(not line.strip() for line in lines)
    assert len(records) + skipped + blank == len(lines)
    assert records and skipped
