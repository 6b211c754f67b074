"""Retrievers of one signature: each question's best candidates of a pool."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from clara_jax.clara import Clara
from clara_jax.errors import fail, require_package
from clara_jax.evaluation.memories import Memories
from clara_jax.evaluation.pool import Pool
from clara_jax.models.roles import cosine_scores
from clara_jax.retrieval.search import search
from clara_jax.scoring.bm25 import Bm25
from clara_jax.scoring.questions import Question
from clara_jax.scoring.rankings import Ranking
from clara_jax.sharding import MeshConfig, make_mesh

RETRIEVERS = ("model", "bm25", "dense", "given")

# The rankings of some questions by their ids, each of at most k documents, best first.
Retriever = Callable[[Sequence[Question], int], dict[str, Ranking]]
Vectors = Float[np.ndarray, "texts width"]


def given(pool: Pool) -> Retriever:
    """The file's own order; the score is one over the rank. Raises `UserError` where the pool is not the question's."""
    if not pool.own:
        fail("the file's own order (given) ranks a question's own documents", "Take pool own, or another retriever")

    def rank(questions: Sequence[Question], k: int) -> dict[str, Ranking]:
        return {q.id: [(key, 1 / n) for n, key in enumerate(pool.candidates(q)[:k], 1)] for q in questions}

    return rank


def bm25(pool: Pool) -> Retriever:
    """BM25; how rare a word is counts over a question's candidates. Raises `UserError` as `Bm25` does."""
    whole = None if pool.own else Bm25(list(pool.documents.values()))

    def rank(questions: Sequence[Question], k: int) -> dict[str, Ranking]:
        return {q.id: (whole or Bm25(q.documents)).rank(q.text, k) for q in questions}

    return rank


def model(clara: Clara, pool: Pool, memories: Memories, first: Retriever | None = None, rerank: int = 0) -> Retriever:
    """The model's query reasoner, by the cosine of flattened memories. With `first`, of its best `rerank` alone."""

    def of_questions(texts: Sequence[str]) -> Vectors:
        return _flat(np.asarray(clara.encode_query(texts)))

    return _by_cosine(pool, of_questions, lambda keys: _flat(memories.of(keys)), first, rerank)


def dense(name: str, pool: Pool, first: Retriever | None = None, rerank: int = 0) -> Retriever:
    """A dense encoder of sentence-transformers, by name or folder: cosine of its vectors.

    Raises `UserError` where the package is missing or the encoder cannot be loaded.
    """
    encoder = _sentence_transformer(name)
    known: dict[str, np.ndarray] = {}

    def encode(texts: Sequence[str]) -> Vectors:
        return np.asarray(encoder.encode(list(texts), convert_to_numpy=True, show_progress_bar=False), np.float32)

    def of_documents(keys: Sequence[str]) -> Vectors:
        missing = [key for key in dict.fromkeys(keys) if key not in known]
        if missing:
            known.update(zip(missing, encode([pool.documents[key].content for key in missing]), strict=True))
        return np.stack([known[key] for key in keys])

    return _by_cosine(pool, encode, of_documents, first, rerank)


def _by_cosine(
    pool: Pool,
    of_questions: Callable[[Sequence[str]], Vectors],
    of_documents: Callable[[Sequence[str]], Vectors],
    first: Retriever | None,
    rerank: int,
) -> Retriever:
    def rank(questions: Sequence[Question], k: int) -> dict[str, Ranking]:
        queries = of_questions([q.text for q in questions])
        if first is None and not pool.own:
            return _of_all(questions, queries, list(pool.documents), of_documents, k)
        of_first: Mapping[str, Ranking] = {} if first is None else first(questions, rerank)
        keys = {q.id: pool.candidates(q) if first is None else [key for key, _ in of_first[q.id]] for q in questions}
        every = list(dict.fromkeys(key for some in keys.values() for key in some))
        if every:
            of_documents(every)  # all at once, so that they are batched
        return {
            q.id: _of_some(query, keys[q.id], of_documents)[:k] for q, query in zip(questions, queries, strict=True)
        }

    return rank


def _of_all(
    questions: Sequence[Question],
    queries: Vectors,
    keys: Sequence[str],
    of_documents: Callable[[Sequence[str]], Vectors],
    k: int,
) -> dict[str, Ranking]:
    mesh = make_mesh(MeshConfig(), jax.local_devices())  # the other processes of a run take no part
    found = search(queries, [of_documents(keys)], min(k, len(keys)), mesh)
    return {
        question.id: [(keys[i], float(score)) for i, score in zip(indices, scores, strict=True) if i >= 0]
        for question, indices, scores in zip(questions, found.indices, found.scores, strict=True)
    }


def _of_some(query: np.ndarray, keys: Collection[str], of_documents: Callable[[Sequence[str]], Vectors]) -> Ranking:
    if not keys:
        return []
    keys = list(keys)
    scores = np.asarray(cosine_scores(jnp.asarray(query)[None, None], jnp.asarray(of_documents(keys))[None, :, None]))[
        0
    ]
    order = np.argsort(-scores, kind="stable")
    # As in `search`, a memory that is not finite is never found.
    return [(keys[i], float(scores[i])) for i in order if np.isfinite(scores[i])]


def _flat(memories: Float[np.ndarray, "texts memory hidden"]) -> Vectors:
    return memories.reshape(len(memories), -1).astype(np.float32)


def _sentence_transformer(name: str) -> Any:
    library = require_package("sentence_transformers", f"--dense {name}", "sentence-transformers")
    try:
        return library.SentenceTransformer(name)
    except (OSError, ValueError) as error:
        fail(f"--dense {name} cannot be loaded ({error})", "Name a sentence-transformers model or its folder")
