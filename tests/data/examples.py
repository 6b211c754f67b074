"""Records of every format and files of them, and a small tokenizer."""

import functools
import json
import random

from clara_jax.data.records import FieldError
from clara_jax.data.sources import BadRecords, open_source
from clara_jax.data.tokenizer import ClaraTokenizer
from tests.conftest import FIXTURES

LIST = {"data_type": "qa", "question": ["Who?", "When?"], "answers": ["Ada", "1843"], "docs": ["Ada wrote it."]}
PARAPHRASE = {"data_type": "paraphrase", "answers": ["Said anew."], "docs": ["Said."]}
SINGLE = {"question": "Who?", "answer": "Ada", "docs": ["Ada.", "Bob.", ""], "pos_index": [2, 0]}
GOOD = (LIST, PARAPHRASE, SINGLE)


def changed(record, **fields):
    """The record with other fields; ... removes one."""
    return {key: value for key, value in (record | fields).items() if value is not ...}


def write_lines(path, *lines):
    """A file of records and raw lines."""
    path.write_bytes(b"\n".join(json.dumps(x).encode() if isinstance(x, dict) else x for x in lines) + b"\n")
    return path


def read_records(name, policy="stop"):
    """All records of a source, and how many were skipped."""
    bad, records = BadRecords(str(name), policy), []
    for where, found in open_source(str(name)).records():
        if isinstance(found, FieldError):
            bad.add(where, found)
        else:
            records.append(found)
    return records, bad.count


@functools.cache
def small_tokenizer(memory=2, name="phi_template_inside"):
    """A tokenizer of the fixtures."""
    return ClaraTokenizer(FIXTURES / "tokenizers" / name, memory)


def questions(count, words=60):
    """Question records of mixed lengths and numbers of documents; the first answer tells the record."""
    rng = random.Random(0)

    def text():
        return " ".join(rng.choice(("red", "blue", "cat", "dog", "sat")) for _ in range(rng.randint(1, words)))

    def record(number):
        known = {"pos_index": [0]} if number % 2 else {}
        documents = [text() for _ in range(rng.randint(1, 4))]
        return {"question": f"Which? {text()}", "answers": [str(number), text()], "docs": documents, **known}

    return [record(number) for number in range(count)]
