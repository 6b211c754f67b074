"""Training records: the reference's formats, checked field by field.

    {"data_type": "qa", "question": ["...", ...], "answers": ["...", ...], "docs": ["..."]}
    {"data_type": "paraphrase", "answers": ["..."], "docs": ["..."]}
    {"question": "...", "answer": "...", "docs": ["...", ...], "pos_index": [3]}

The answer is `answer` (text), else the first of `answers`, else the first of `golden_answers`. A field that is
null is one that is not there: tables write that into rows without a field that other rows have.
"""

import dataclasses
from typing import Any, Literal, NoReturn

DataType = Literal["qa", "paraphrase"]
BadRecordPolicy = Literal["stop", "skip"]


@dataclasses.dataclass(frozen=True)
class Record:
    """One training sample as text.

    A question list has as many answers as questions; a single question has its accepted answers, best
    first. `positives` are indices of the documents known to be relevant, None where the data does not say.
    """

    documents: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    data_type: DataType = "qa"
    question_list: bool = False
    positives: tuple[int, ...] | None = None


class FieldError(ValueError):
    """A field of a record is not what it must be; the text says which and what was expected."""


def parse_record(fields: Any) -> Record:
    """Check one decoded JSON object (or row of a table) and return its record. Raises `FieldError`."""
    if not isinstance(fields, dict):
        _refuse("the record", "a JSON object", fields)
    fields = {key: value for key, value in fields.items() if value is not None}
    data_type = fields.get("data_type", "qa")
    if data_type not in ("qa", "paraphrase"):
        _refuse("data_type", '"qa" or "paraphrase"', data_type)
    documents = _texts(fields, "docs")
    if not documents:
        _refuse("docs", "at least one text", fields.get("docs"))
    answers = _answers(fields)
    question_list = isinstance(fields.get("question"), list)
    if data_type == "paraphrase":
        questions: tuple[str, ...] = ()
    elif question_list:
        questions = _texts(fields, "question")
        if len(questions) != len(answers) or not questions:
            raise FieldError(f"field 'question' has {len(questions)} texts and its answers {len(answers)}")
    else:
        questions = (_text(fields, "question"),)
    return Record(documents, questions, answers, data_type, question_list, _positives(fields, len(documents)))


def _answers(fields: dict[str, Any]) -> tuple[str, ...]:
    for key in ("answer", "answers", "golden_answers"):
        if key not in fields:
            continue
        if isinstance(fields[key], str) and key == "answer":
            return (_text(fields, key),)
        texts = _texts(fields, key)
        if not texts:
            _refuse(key, "at least one text", fields[key])
        return texts
    raise FieldError("field 'answer' is missing (or 'answers', or 'golden_answers')")


def _text(fields: dict[str, Any], key: str) -> str:
    if key not in fields:
        raise FieldError(f"field '{key}' is missing")
    if not isinstance(fields[key], str):
        _refuse(key, "a text", fields[key])
    return _encodable(key, fields[key])


def _texts(fields: dict[str, Any], key: str) -> tuple[str, ...]:
    if key not in fields:
        raise FieldError(f"field '{key}' is missing")
    values = fields[key]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        _refuse(key, "a list of texts", values)
    return tuple(_encodable(key, value) for value in values)


def _encodable(key: str, text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise FieldError(f"field '{key}' holds a lone surrogate, which is not text") from None
    return text


def _positives(fields: dict[str, Any], documents: int) -> tuple[int, ...] | None:
    values = fields.get("pos_index")
    if values is None:
        return None
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        _refuse("pos_index", "a list of integers", values)
    outside = [value for value in values if not 0 <= value < documents]
    if outside:
        raise FieldError(f"field 'pos_index' holds {outside[0]}, and there are {documents} docs")
    return tuple(values)


def _refuse(field: str, expected: str, found: Any) -> NoReturn:
    shown = repr(found)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    where = field if field.startswith("the ") else f"field '{field}'"
    raise FieldError(f"{where} must be {expected}, not {shown}")
