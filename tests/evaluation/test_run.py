"""One evaluation from questions to scores: the right documents, honest controls, sums that add up."""

import types

import numpy as np
import pytest

from clara_jax.clara import Clara, Generation
from clara_jax.errors import UserError
from clara_jax.evaluation import retrievers
from clara_jax.evaluation.pool import choose, make_pool
from clara_jax.evaluation.run import EvaluationSettings, evaluate
from clara_jax.evaluation.systems import Decoding, with_wrong_documents
from clara_jax.scoring.candidates import candidate
from clara_jax.scoring.questions import Question

TOPICS = ["oboe", "mill", "river", "bread", "ship", "tower"]
DOCUMENTS = [candidate("", f"The {topic} belongs to owner{n}.") for n, topic in enumerate(TOPICS)]


def question(n):
    """Who owns topic n: the relevant document and two others."""
    documents = [DOCUMENTS[(n + 1) % 6], DOCUMENTS[n], DOCUMENTS[(n + 2) % 6]]
    return Question(f"q{n}", f"Who owns the {TOPICS[n]}?", (f"owner{n}",), tuple(documents), (DOCUMENTS[n].id,))


QUESTIONS = [question(n) for n in range(6)]


class Reader(Clara):
    """Stands in for Clara: memories are one-hot by topic, and answers name the owners of the documents given."""

    doc_max_length = 40
    tokenizer = types.SimpleNamespace(
        encode_passages=lambda texts, limit: [([0], len(text) > 100) for text in texts],
        special=types.SimpleNamespace(num_memory=1),
        backend=None,
    )
    model = types.SimpleNamespace(decoder=types.SimpleNamespace(config=types.SimpleNamespace(hidden_size=6)))

    def __init__(self):
        self.compressed = []

    def compress(self, texts):
        self.compressed += texts
        return np.stack([np.eye(6, dtype=np.float32)[[next(n for n, t in enumerate(TOPICS) if t in x)]] for x in texts])

    encode_query = compress

    def generate(self, questions, memories, max_new_tokens):
        texts = [" ".join(f"owner{int(np.argmax(memory[0]))}" for memory in row) for row in memories]
        return Generation(texts, np.zeros((len(texts), 1), np.int32))

    def answer_from_text(self, questions, documents, max_new_tokens, prompt_limit):
        texts = [" ".join(text.split()[-1].strip(".") for text in row) for row in documents]
        return Generation(texts, np.zeros((len(texts), 1), np.int32), cut=1)


def run(questions=QUESTIONS, pool="own", reader=None, **settings):
    settings = EvaluationSettings(pool=pool, systems=("memory", "text", "no_memory", "wrong_memory"), **settings)
    reader = reader or Reader()
    return evaluate(reader, questions, make_pool(questions, pool), settings, Decoding())


@pytest.mark.parametrize("pool", ["own", "all"])
@pytest.mark.parametrize("setting", ["normal", "oracle", "end_to_end"])
def test_each_setting_gives_the_right_documents(pool, setting):
    """All retrievers find the document here, so a model that reads its memories answers every question."""
    found = run(pool=pool, setting=setting, k=1)
    assert found.answers["memory"] == found.answers["text"] == {"em": 1.0, "f1": 1.0, "cover_em": 1.0}
    assert found.answers["no_memory"]["em"] == found.answers["wrong_memory"]["em"] == 0.0
    for retriever in ("model", "bm25"):
        assert found.retrieval[retriever]["recall@1"] == found.retrieval[retriever]["mrr"] == 1.0
    assert found.answer_intervals["memory"]["em"] == (1.0, 1.0)
    assert all(row["documents"][0]["id"] in row["relevant"] for row in found.rows)


def test_more_documents_cost_precision_not_cover():
    """So many documents are given, best first, to all systems alike; fewer where a question has fewer."""
    found = run(k=5)
    assert {len(row["documents"]) for row in found.rows} == {3}
    assert found.answers["memory"]["cover_em"] == 1.0 and found.answers["memory"]["em"] == 0.0
    assert found.answers["memory"]["f1"] == pytest.approx(0.5)  # one word of three, all of one


def test_a_document_is_compressed_once():
    """If this broke, a question's candidates would be compressed again for each question that shares them."""
    reader = Reader()
    run(reader=reader, pool="all", setting="end_to_end", k=2)
    documents = [text for text in reader.compressed if not text.startswith("Who")]
    assert sorted(documents) == sorted(document.content for document in DOCUMENTS)


def test_questions_that_cannot_be_scored_are_left_out_and_counted():
    """If this broke, they would count as wrong answers, or as found documents, without a word."""
    unanswerable = Question("x", "Who owns it, the mill?", (), (DOCUMENTS[1],), (DOCUMENTS[1].id,))
    unjudged = Question("y", "Who owns the ship?", ("owner4",), (DOCUMENTS[4],), ())
    found = run([*QUESTIONS, unanswerable, unjudged], k=1)
    assert (found.counts["questions"], found.counts["answered"]) == (8, 7)
    assert (found.counts["without_accepted_answers"], found.counts["without_relevant_documents"]) == (1, 1)
    assert found.counts["prompts_cut"] == 1
    rows = {row["id"]: row for row in found.rows}
    assert rows["x"]["answers"] == {} and rows["y"]["retrieval"] == {}
    oracle = run([*QUESTIONS, unjudged], k=1, setting="oracle")  # nothing is known to be right for it
    assert oracle.counts["answered"] == 6
    with pytest.raises(UserError, match="no question has relevant documents"):
        run([unjudged], setting="oracle")


def test_wrong_documents_are_never_the_question_s_own():
    """If this broke, the control would be given the answer."""
    used = {q.id: [q.relevant[0]] for q in QUESTIONS}
    for seed in range(20):
        for one in with_wrong_documents(QUESTIONS, used, seed):
            assert len(one.wrong) == 1 and not {*one.wrong} & {document.id for document in one.question.documents}
    assert with_wrong_documents(QUESTIONS, used, 3) == with_wrong_documents(QUESTIONS, used, 3)
    with pytest.raises(UserError, match="wrong_memory has no document for question 'q0'"):
        with_wrong_documents(QUESTIONS[:1], used, 0)


def test_short_rankings_are_filled_up_in_the_file_s_order():
    """BM25 leaves out documents that share no word; every question still gets its k documents."""
    pool = make_pool(QUESTIONS, "own")
    chosen = choose(QUESTIONS[:1], pool, "normal", {"q0": [(DOCUMENTS[2].id, 1.0)]}, 3)
    assert chosen["q0"] == [(DOCUMENTS[2].id, 1.0), (DOCUMENTS[1].id, None), (DOCUMENTS[0].id, None)]


def test_reranking_orders_what_bm25_found():
    """Only BM25's best are in the ranking, in the model's order."""
    found = run(pool="all", rerank=2, k=1)
    for name, ranking in found.rankings["bm25"].items():
        assert {key for key, _ in found.rankings["model"][name]} == {key for key, _ in ranking[:2]}
    everything = run(pool="all", k=1).rankings["model"]["q0"]
    assert len(everything) == 6 > len(found.rankings["model"]["q0"])


def test_a_dense_encoder_is_a_retriever(monkeypatch):
    """Where sentence-transformers is installed it is scored beside the others; where it is not, that is said."""

    class Encoder:
        def encode(self, texts, **_):
            return np.stack([[text.count(topic) for topic in TOPICS] for text in texts]).astype(np.float32)

    with pytest.raises(UserError, match="--dense some/model needs the package sentence-transformers"):
        monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
        run(dense="some/model")
    monkeypatch.setattr(retrievers, "_sentence_transformer", lambda name: Encoder())
    found = run(dense="some/model", retriever="dense", k=1)
    assert found.retrieval["dense"]["recall@1"] == 1.0 and found.answers["memory"]["em"] == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"systems": ("memory", "magic")}, "there is no system magic"),
        ({"systems": ()}, "there is no system at all"),
        ({"k": 0}, "k is 0"),
        ({"retriever": "dense"}, "retriever is dense, and no encoder is named"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    """A mistyped option is named."""
    with pytest.raises(UserError, match=message):
        EvaluationSettings(**settings)


def test_questions_without_documents_need_a_corpus():
    """If this broke, FlashRAG's questions would be answered from nothing."""
    alone = [Question("q0", "Who owns the oboe?", ("owner0",), (), ())]
    with pytest.raises(UserError, match=r"question 'q0' has no documents.*corpus"):
        make_pool(alone, "own")
    pool = make_pool(alone, "own", DOCUMENTS)
    settings = EvaluationSettings(setting="end_to_end", k=1, systems=("memory",))
    found = evaluate(Reader(), alone, pool, settings, Decoding())
    assert found.answers["memory"]["em"] == 1.0 and found.retrieval == {}
