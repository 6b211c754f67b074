"""Questions with accepted answers, candidate documents and the relevant ones, from the formats of public data sets.

A document's id follows from its title and text alone (BEIR names its own), so that the documents of all questions of a
file form one corpus without repeats: `corpus_of`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from clara_jax.errors import fail
from clara_jax.scoring.beir import is_beir, qrels_file, read_corpus, read_queries, read_relevant
from clara_jax.scoring.candidates import Candidate, candidate, candidate_of
from clara_jax.scoring.fields import Fields, is_text, read_objects


@dataclasses.dataclass(frozen=True)
class Question:
    """A question to a system, with what is known about it.

    `answers` are all accepted (none: the data set has no answer for it). `documents` are its candidates in the file's
    order, without repeats. `relevant` are the ids of those that hold the answer (none: not known).
    """

    id: str
    text: str
    answers: tuple[str, ...]
    documents: tuple[Candidate, ...]
    relevant: tuple[str, ...]


def read_questions(path: Path) -> list[Question]:
    """The questions of a file or a BEIR folder; the first entry's fields tell the format (see `_FORMATS`).

    Entries are one JSON object a line, or one list of them. A question without an id is numbered, from 1. Raises
    `UserError`, which names file, line (or entry) and field, for anything that is not as its format says, for an id
    that occurs twice and for a file without questions.

    BEIR: the questions of one table of relevant documents, `path` itself (`FOLDER/qrels/SPLIT.tsv`), or in a folder
    `qrels/test.tsv`, else the only one. Their documents are the relevant ones; `beir.read_corpus` has them all.
    """
    questions = _beir(path) if is_beir(path) else _file(path)
    if not questions:
        fail(f"{path} holds no question", "Give a file with questions")
    numbers: dict[str, int] = {}
    for number, question in enumerate(questions, 1):
        first = numbers.setdefault(question.id, number)
        if first != number:
            fail(f"{path}: questions {first} and {number} have the same id {question.id!r}", "Give each its own")
    return questions


def corpus_of(questions: Iterable[Question]) -> list[Candidate]:
    """All documents of the questions, each id once, in the order of their first occurrence."""
    return list({document.id: document for question in questions for document in question.documents}.values())


def _file(path: Path) -> list[Question]:
    entries = list(read_objects(path))
    if not entries:
        return []
    for form in _FORMATS:
        if all(any(map(entries[0].has, names)) for names in form.told_by):
            return [question for number, entry in enumerate(entries, 1) for question in form.read(entry, number)]
    known = "; ".join(f"{form.name} ({form.fields})" for form in _FORMATS)
    found = ", ".join(entries[0].values) or "none"
    fail(
        f"{entries[0].where}: its fields ({found}) are of no format that is understood",
        f"Give {known}; or a BEIR folder (queries.jsonl, corpus.jsonl, qrels/*.tsv)",
    )


def _question(
    entry: Fields, identity: str, answers: Iterable[str], documents: Sequence[Candidate], relevant: Iterable[Candidate]
) -> Question:
    distinct = {document.id: document for document in documents}
    wanted = {document.id for document in relevant}
    return Question(
        identity,
        entry.text("question"),
        tuple(dict.fromkeys(answers)),
        tuple(distinct.values()),
        tuple(key for key in distinct if key in wanted),
    )


def _id(entry: Fields, number: int) -> str:
    return entry.identity(("id", "_id", "qid")) or str(number)


def _answers(entry: Fields) -> tuple[str, ...]:
    """Accepted answers of this project's records: `answer`, else `answers`, else `golden_answers`."""
    key = next(filter(entry.has, ("answer", "answers", "golden_answers")), "answer")
    if key == "answer" and not isinstance(entry.values.get(key), list):
        return (entry.text(key),)
    return entry.texts(key) or entry.refuse(key, "at least one text")


def _record(entry: Fields, number: int) -> list[Question]:
    documents = [candidate_of(content) for content in entry.texts("docs")]
    positions = entry.values["pos_index"] if entry.has("pos_index") else []
    if not isinstance(positions, list) or not all(
        type(position) is int and 0 <= position < len(documents) for position in positions
    ):
        entry.refuse("pos_index", f"a list of whole numbers from 0 on, below {len(documents)}, the number of docs")
    relevant = [documents[position] for position in positions]
    if not isinstance(entry.values.get("question"), list):
        return [_question(entry, _id(entry, number), _answers(entry), documents, relevant)]
    # Several questions about the same documents, each with one answer.
    texts, answers = entry.texts("question"), _answers(entry)
    if len(texts) != len(answers):
        entry.refuse("question", f"as many texts as there are answers ({len(answers)}, not {len(texts)})")
    single = [Fields({"question": text}, entry.where) for text in texts]
    ids = [f"{_id(entry, number)}.{i}" for i in range(1, len(texts) + 1)]
    return [
        _question(*parts, documents, relevant)
        for parts in zip(single, ids, ([answer] for answer in answers), strict=True)
    ]


def _alone(entry: Fields, number: int) -> list[Question]:
    return [_question(entry, _id(entry, number), _answers(entry), (), ())]


def _hotpot(entry: Fields, number: int) -> list[Question]:
    context = entry.values.get("context")
    if not isinstance(context, list) or not all(map(_is_paragraph, context)):
        entry.refuse("context", "a list of [title, [sentence, ...]]")
    facts = entry.values.get("supporting_facts")
    if not isinstance(facts, list) or not all(isinstance(fact, list) and fact and is_text(fact[0]) for fact in facts):
        entry.refuse("supporting_facts", "a list of [title, sentence number]")
    documents = [candidate(title, _joined(sentences)) for title, sentences in context]
    titles = {fact[0] for fact in facts}
    missing = sorted(titles - {document.title for document in documents})
    if missing:
        fail(
            f"{entry.where}: field 'supporting_facts' names {missing[0]!r}, no title of 'context'",
            "Give a file whose context holds every supporting paragraph (HotpotQA's distractor setting)",
        )
    relevant = [document for document in documents if document.title in titles]
    return [_question(entry, _id(entry, number), [entry.text("answer")], documents, relevant)]


def _is_paragraph(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    title, sentences = value
    return is_text(title) and isinstance(sentences, list) and all(map(is_text, sentences))


def _joined(sentences: Sequence[str]) -> str:
    """HotpotQA's sentences begin with the space before them, those of 2WikiMultihopQA do not."""
    return ("" if any(sentence[:1].isspace() for sentence in sentences[1:]) else " ").join(sentences)


def _musique(entry: Fields, number: int) -> list[Question]:
    paragraphs = entry.objects("paragraphs")
    documents = [
        candidate(paragraph.optional("title"), paragraph.text("paragraph_text", may_be_blank=True))
        for paragraph in paragraphs
    ]
    relevant = [doc for doc, paragraph in zip(documents, paragraphs, strict=True) if paragraph.flag("is_supporting")]
    answers = [entry.text("answer"), *(entry.texts("answer_aliases") if entry.has("answer_aliases") else ())]
    answerable = not entry.has("answerable") or entry.flag("answerable")
    return [_question(entry, _id(entry, number), answers if answerable else [], documents, relevant)]


def _natural(entry: Fields, number: int) -> list[Question]:
    contexts = entry.objects("ctxs")
    documents = [candidate(context.optional("title"), context.text("text", may_be_blank=True)) for context in contexts]
    # A passage that is marked as the gold one says more than that the answer's words occur in it.
    keys = ("isgold", "hasanswer", "has_answer")
    key = next((key for key in keys if any(context.has(key) for context in contexts)), None)
    relevant = [doc for doc, context in zip(documents, contexts, strict=True) if key and context.flag(key)]
    return [_question(entry, _id(entry, number), entry.texts("answers"), documents, relevant)]


def _squad(entry: Fields, number: int) -> list[Question]:
    found: list[Question] = []
    for article in entry.objects("data"):
        title = article.optional("title").replace("_", " ")
        for paragraph in article.objects("paragraphs"):
            document = candidate(title, paragraph.text("context"))
            for asked in paragraph.objects("qas"):
                answers = [answer.text("text") for answer in asked.objects("answers")]
                found.append(_question(asked, _id(asked, len(found) + 1), answers, [document], [document]))
    return found


@dataclasses.dataclass(frozen=True)
class _Format:
    """A format: told by one field of each group being in the first entry."""

    name: str
    fields: str
    told_by: tuple[tuple[str, ...], ...]
    read: Callable[[Fields, int], list[Question]]


_FORMATS = (
    _Format("HotpotQA or 2WikiMultihopQA", "question, answer, context, supporting_facts", (("context",),), _hotpot),
    _Format("MuSiQue", "question, answer, answer_aliases, paragraphs", (("question",), ("paragraphs",)), _musique),
    _Format("Natural Questions with passages", "question, answers, ctxs", (("ctxs",),), _natural),
    _Format("this project's records", "question, docs, answer or answers, pos_index", (("docs",),), _record),
    _Format("SQuAD", "data: title, paragraphs: context, qas", (("data",),), _squad),
    _Format(
        "FlashRAG or questions alone",
        "question, golden_answers or answers or answer",
        (("question",), ("golden_answers", "answers", "answer")),
        _alone,
    ),
)


def _beir(path: Path) -> list[Question]:
    table = qrels_file(path)
    folder = table.parent.parent
    relevant, queries = read_relevant(table), read_queries(folder)
    unknown = [query for query in relevant if query not in queries]
    if unknown:
        fail(f"{table}: question {unknown[0]!r} is not in {folder / 'queries.jsonl'}", "Add it, or leave its lines out")
    places = {document: where for found in relevant.values() for document, where in found.items()}
    documents = {document.id: document for document in read_corpus(folder) if document.id in places}
    lost = [document for document in places if document not in documents]
    if lost:
        fail(f"{places[lost[0]]}: document {lost[0]!r} is not in {folder / 'corpus.jsonl'}", "Use the whole corpus")
    return [
        Question(query, queries[query], (), tuple(documents[key] for key in found), tuple(found))
        for query, found in relevant.items()
    ]
