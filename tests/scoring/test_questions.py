"""Questions of public data sets: each format in small, and what is refused."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clara_jax.errors import UserError
from clara_jax.scoring import beir
from clara_jax.scoring.candidates import candidate, candidate_of
from clara_jax.scoring.questions import corpus_of, read_questions

ADA, ALAN, EMMY = "Ada\nAda wrote a program.", "Alan\nAlan broke a code.", "Emmy\nEmmy found a theorem."
RECORD = {"id": "q1", "question": "Who wrote?", "docs": [ADA, ALAN], "answer": "Ada", "pos_index": [0]}
HOTPOT = {
    "_id": "h1",
    "question": "Who wrote?",
    "answer": "Ada",
    "context": [["Ada", ["Ada wrote.", " A program."]], ["Alan", ["Alan broke.", " A code."]]],
    "supporting_facts": [["Alan", 1], ["Alan", 0]],
}
TWO_WIKI = HOTPOT | {"context": [["Ada", ["Ada wrote.", "A program."]], ["Alan", []]], "type": "comparison"}
MUSIQUE = {
    "id": "2hop__1",
    "question": "Who wrote?",
    "answer": "Ada",
    "answer_aliases": ["Ada L.", "Ada"],
    "answerable": True,
    "paragraphs": [
        {"idx": 0, "title": "Ada", "paragraph_text": "Ada wrote a program.", "is_supporting": True},
        {"idx": 1, "title": "Alan", "paragraph_text": "Alan broke a code.", "is_supporting": False},
    ],
}
NATURAL = {
    "question": "who wrote",
    "answers": ["Ada", "Ada L."],
    "ctxs": [
        {"title": "Ada", "text": "Ada wrote a program.", "hasanswer": True},
        {"title": "Alan", "text": "Alan knew of Ada.", "hasanswer": False},
    ],
}
SQUAD = {
    "version": "2.0",
    "data": [
        {
            "title": "Ada_Lovelace",
            "paragraphs": [
                {
                    "context": "Ada wrote a program.",
                    "qas": [
                        {"id": "s1", "question": "Who wrote?", "answers": [{"text": "Ada"}, {"text": "Ada"}]},
                        {"id": "s2", "question": "When?", "is_impossible": True, "answers": []},
                    ],
                }
            ],
        }
    ],
}
FLASHRAG = {"id": "test_0", "question": "who wrote", "golden_answers": ["Ada"], "metadata": {"context": "none"}}


def written(path, *entries, text=None):
    path.write_text("\n".join(map(json.dumps, entries)) if text is None else text, encoding="utf-8")
    return path


def only(path):
    (question,) = read_questions(path)
    return question


def test_own_records(tmp_path):
    """If this broke, the data that a model was trained on could not be used to measure it."""
    question = only(written(tmp_path / "own.jsonl", RECORD))
    assert (question.id, question.text, question.answers) == ("q1", "Who wrote?", ("Ada",))
    ada = question.documents[0]
    assert (ada.title, ada.text, ada.content) == ("Ada", "Ada wrote a program.", ADA)
    assert question.relevant == (ada.id,)
    unknown = only(written(tmp_path / "own.jsonl", RECORD | {"answer": None, "answers": ["a", "b"], "pos_index": None}))
    assert unknown.answers == ("a", "b") and unknown.relevant == ()


def test_a_list_of_questions_is_several_questions(tmp_path):
    """If this broke, every question of a stage-1 file would be scored against the first one's answer."""
    record = {"question": ["Who?", "What?"], "answers": ["Ada", "A program"], "docs": [ADA], "data_type": "qa"}
    first, second = read_questions(written(tmp_path / "list.jsonl", record))
    assert (first.id, first.answers, second.id, second.text) == ("1.1", ("Ada",), "1.2", "What?")
    with pytest.raises(UserError, match=r"line 1: field 'question' is .*as many texts as there are answers \(1"):
        read_questions(written(tmp_path / "list.jsonl", record | {"answers": ["Ada"]}))


@pytest.mark.parametrize("one_list", [False, True])
@pytest.mark.parametrize(
    ("entry", "answers", "text", "relevant"),
    [
        (HOTPOT, ("Ada",), "Ada wrote. A program.", "Alan"),
        (TWO_WIKI, ("Ada",), "Ada wrote. A program.", "Alan"),
        (MUSIQUE, ("Ada", "Ada L."), "Ada wrote a program.", "Ada"),
        (NATURAL, ("Ada", "Ada L."), "Ada wrote a program.", "Ada"),
    ],
)
def test_native_formats(tmp_path, entry, answers, text, relevant, one_list):
    """If this broke, a data set as it is published would be refused, or its gold paragraphs be taken for others."""
    question = only(written(tmp_path / "native.json", [entry] if one_list else entry))
    assert question.id == str(entry.get("id", entry.get("_id", 1)))
    assert question.answers == answers
    assert [d.title for d in question.documents] == ["Ada", "Alan"] and question.documents[0].text == text
    assert [d.title for d in question.documents if d.id in question.relevant] == [relevant]


def test_the_gold_mark_counts_before_words(tmp_path):
    """If this broke, a distractor that happens to hold the answer's words would count as the gold passage."""
    marked = [context | {"isgold": context["title"] == "Alan"} for context in NATURAL["ctxs"]]
    question = only(written(tmp_path / "nq.jsonl", NATURAL | {"ctxs": marked}))
    assert question.relevant == (question.documents[1].id,)


def test_unanswerable_questions_accept_nothing(tmp_path):
    """If this broke, a system would be right on a question without an answer when it says the wrong thing."""
    assert only(written(tmp_path / "m.json", MUSIQUE | {"answerable": False})).answers == ()


def test_squad(tmp_path):
    """If this broke, SQuAD's paragraphs would occur once per question in a corpus, or be without their title."""
    for text in (json.dumps(SQUAD), json.dumps(SQUAD, indent=2)):
        first, second = read_questions(written(tmp_path / "squad.json", text=text))
        assert (first.id, first.answers, second.id, second.answers) == ("s1", ("Ada",), "s2", ())
        assert first.documents == second.documents and first.relevant == (first.documents[0].id,)
        assert [d.title for d in corpus_of([first, second])] == ["Ada Lovelace"]


def test_questions_alone(tmp_path):
    """If this broke, FlashRAG's files, which have no documents, could not be used with a corpus."""
    question = only(written(tmp_path / "flash.jsonl", FLASHRAG))
    assert (question.id, question.answers, question.documents, question.relevant) == ("test_0", ("Ada",), (), ())


def beir_folder(root, tables=("test",), qrels="query-id\tcorpus-id\tscore\nq2\td1\t2\nq2\td3\t1\nq1\td2\t0\n"):
    (root / "qrels").mkdir(parents=True, exist_ok=True)
    written(root / "queries.jsonl", *({"_id": f"q{i}", "text": f"Question {i}?"} for i in (1, 2, 3)))
    written(root / "corpus.jsonl", *({"_id": f"d{i}", "title": f"T{i}", "text": f"Text {i}."} for i in (1, 2, 3)))
    for name in tables:
        (root / "qrels" / f"{name}.tsv").write_text(qrels, encoding="utf-8")
    return root


def test_beir(tmp_path):
    """If this broke, retrieval on BEIR would be measured on other questions than its published numbers."""
    folder = beir_folder(tmp_path / "set", ("test", "train"))
    for path in (folder, folder / "qrels" / "train.tsv"):
        first, second = read_questions(path)
        assert (first.id, first.text, first.relevant) == ("q2", "Question 2?", ("d1", "d3"))
        assert [d.content for d in first.documents] == ["T1\nText 1.", "T3\nText 3."]
        assert (second.id, second.relevant, second.answers) == ("q1", (), ())
    assert [d.id for d in beir.read_corpus(folder)] == ["d1", "d2", "d3"]


@pytest.mark.parametrize(
    ("tables", "qrels", "message"),
    [
        (("dev", "train"), "", r"qrels holds dev.tsv, train.tsv. Name the one"),
        ((), "", r"holds no .tsv file"),
        (("test",), "q1\td9\t1\n", r"test.tsv, line 1: document 'd9' is not in .*corpus.jsonl"),
        (("test",), "\nq9\td1\t1\n", r"question 'q9' is not in .*queries.jsonl"),
        (("test",), "q1 0 d1 1\n", r"line 1: 'q1 0 d1 1'. It must be query id, document id and score"),
        (("test",), "q1\td1\thigh\n", r"line 1: the score is 'high'"),
        (("test",), "query-id\tcorpus-id\tscore\n", r"holds no question"),
    ],
)
def test_beir_refusals(tmp_path, tables, qrels, message):
    """If this broke, a half copied BEIR folder would give low numbers rather than an error."""
    with pytest.raises(UserError, match=message):
        read_questions(beir_folder(tmp_path / "set", tables, qrels))


def test_a_folder_that_is_not_beir(tmp_path):
    """If this broke, a user who names the wrong folder would not learn what a folder must hold."""
    with pytest.raises(UserError, match=r"has no queries.jsonl and no corpus.jsonl and no qrels"):
        read_questions(tmp_path)
    with pytest.raises(UserError, match=r"x.tsv cannot be read \(No such file"):
        read_questions(beir_folder(tmp_path / "set") / "qrels" / "x.tsv")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (RECORD | {"pos_index": [2]}, r"line 2: field 'pos_index' is \[2\]. It must be .* below 2"),
        (RECORD | {"pos_index": 0}, r"'pos_index' is 0"),
        (RECORD | {"docs": "text"}, r"'docs' is 'text'. It must be a list of texts"),
        (RECORD | {"answer": None}, r"field 'answer' is missing"),
        (RECORD | {"answer": " "}, r"'answer' is ' '. It must be a text that is not blank"),
        (RECORD | {"question": "\ud800"}, r"'question' is"),
        (RECORD | {"answer": None, "answers": []}, r"'answers' is \[\]. It must be at least one text"),
        (RECORD | {"id": "q1"}, r"questions 1 and 2 have the same id 'q1'"),
        (["q"], r"line 2: a JSON list. It must be a JSON object"),
    ],
)
def test_faulty_records_are_named(tmp_path, entry, message):
    """If this broke, one bad record among thousands would have to be searched for by hand."""
    with pytest.raises(UserError, match=message):
        read_questions(written(tmp_path / "own.jsonl", RECORD, entry))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (HOTPOT | {"supporting_facts": [["Emmy", 0]]}, r"entry 1: field 'supporting_facts' names 'Emmy'"),
        (HOTPOT | {"supporting_facts": None}, r"field 'supporting_facts' is missing"),
        (HOTPOT | {"context": {"title": []}}, r"field 'context' is .*a list of \[title, \[sentence"),
        (HOTPOT | {"context": [["Ada", "text"]]}, r"field 'context' is"),
        (MUSIQUE | {"paragraphs": [{"title": "", "paragraph_text": "x"}]}, r"paragraphs\[0\]: field 'is_supporting'"),
        (NATURAL | {"ctxs": ["text"]}, r"field 'ctxs' is .*list of JSON objects"),
        ({"data": [{"paragraphs": [{"context": "x", "qas": [{"answers": []}]}]}]}, r"qas\[0\]: field 'question'"),
    ],
)
def test_faulty_native_entries_are_named(tmp_path, entry, message):
    """If this broke, a file cut short or exported in another way would stop with a Python error."""
    with pytest.raises(UserError, match=message):
        read_questions(written(tmp_path / "native.json", [entry]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"holds no question"),
        ("[]", r"holds no question"),
        ('{"a": 1, "b": 2}', r"line 1: its fields \(a, b\) are of no format .*HotpotQA.*MuSiQue.*SQuAD.*BEIR folder"),
        ('[{"question": "x"', r"own.jsonl: not JSON \(.*, character 17\)"),
        ('{"question": "x", "answer": "y"}\n{"question"', r"line 2: not JSON"),
        ("3", r"line 1: a JSON int"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    """If this broke, a user who gives another file would not learn which formats there are."""
    with pytest.raises(UserError, match=message):
        read_questions(written(tmp_path / "own.jsonl", text=text))


def test_files_that_cannot_be_read(tmp_path):
    """If this broke, a wrong path or encoding would be a traceback."""
    with pytest.raises(UserError, match=r"none.jsonl cannot be read \(No such file"):
        read_questions(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(FLASHRAG).encode() + b'\n{"question": "\xe9"}')
    with pytest.raises(UserError, match=r"line 2: not UTF-8"):
        read_questions(tmp_path / "latin.jsonl")


documents = st.lists(st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip), min_size=1, max_size=4)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(documents, min_size=1, max_size=4))
def test_a_corpus_holds_each_text_once(tmp_path, lists):
    """If this broke, a corpus would hold copies that take each other's ranks, or lose a document's text."""
    records = [{"question": "?", "answer": "a", "docs": docs, "pos_index": [len(docs) - 1]} for docs in lists]
    questions = read_questions(written(tmp_path / "any.jsonl", *records))
    corpus = corpus_of(questions)
    texts = list(dict.fromkeys(text for docs in lists for text in docs))
    assert [document.content for document in corpus] == texts
    assert len({document.id for document in corpus}) == len(texts)
    by_id = {document.id: document.content for document in corpus}
    for question, docs in zip(questions, lists, strict=True):
        assert [by_id[key] for key in question.relevant] == [docs[-1]]


def test_ids_follow_from_content_alone():
    """If this broke, rankings saved yesterday would name other documents today."""
    assert candidate("Ada", "Ada wrote a program.") == candidate_of(ADA)
    assert candidate_of(ADA).id == "aa40e4e8dc31e00b"
    assert candidate_of("\nAda").content == "\nAda" and candidate_of("Ada").title == ""
