"""The Python API: load a model, compress documents, encode questions, generate answers.

clara = Clara.from_pretrained("checkpoint")
memories = clara.compress(["A document.", "Another one."])
answer = clara.generate(["A question?"], memories[None]).texts[0]
"""

import dataclasses
import random
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from clara_jax import pretrained
from clara_jax.corpus.passages import token_starts
from clara_jax.data.prompts import Prompt, answer_prompt, paraphrase_prompt
from clara_jax.encoding import Encoder, fingerprint
from clara_jax.errors import fail
from clara_jax.files import new_folder
from clara_jax.generation import GREEDY, Sampling
from clara_jax.generation_batches import BatchGenerator, OnText
from clara_jax.models.roles import Params, Role, RoleModel, cosine_scores
from clara_jax.pretrained import Pretrained, with_query_reasoner
from clara_jax.retrieval.first_pass import FirstPass
from clara_jax.retrieval.index import MemoryIndex
from clara_jax.retrieval.store import MemoryStore
from clara_jax.training.runs import load_model

# The reference cuts prompts to this many tokens in generation.
PROMPT_LIMIT = 1024


@dataclasses.dataclass(frozen=True)
class Generation:
    """Generated texts, one per row, and how they came about.

    `token_ids` holds the new tokens, padded after the end. With retrieval, `selected` are the indices of
    the candidates in the prompt, best first, and `scores` their cosine similarity with the question. `cut` is the
    number of prompts that were too long and lost tokens.
    """

    texts: list[str]
    token_ids: Int[np.ndarray, "rows new_tokens"]
    cut: int = 0
    selected: Int[np.ndarray, "rows k"] | None = None
    scores: Float[np.ndarray, "rows candidates"] | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """A passage that an answer was made from: characters `start` to `end` (exclusive) of a document of a store.

    `score` is the cosine of its memory with the question.
    """

    store: str
    document: str
    title: str
    start: int
    end: int
    text: str
    score: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to a question, the passages whose memories it was made from, best first, and where the time went.

    `question_cut` says that the query reasoner did not read the end of the question. `seconds` has the parts `encode`,
    `search`, `read` and `generate`; of questions that were answered together, of all of them.
    """

    question: str
    text: str
    sources: list[Source]
    question_cut: bool
    seconds: dict[str, float]


class Clara:
    """A CLaRa model that compresses, retrieves and answers."""

    def __init__(self, loaded: Pretrained):
        """Wrap a loaded model; use `Clara.from_pretrained` for a folder."""
        self.loaded = loaded
        self.model: RoleModel = loaded.model
        self.params: Params = with_query_reasoner(loaded.params)
        self.tokenizer = loaded.tokenizer
        self.doc_max_length = loaded.checkpoint.doc_max_length
        self.top_k = loaded.checkpoint.top_k
        self._encoder = Encoder(loaded, self.params)
        self._generator = BatchGenerator(loaded)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, base: str | None = None, dtype: str | None = None) -> "Clara":
        """Load the folder of a run or a curriculum (its last stage), or a CLaRa checkpoint in the reference's format.

        `base` overrides the base model that the checkpoint names (folder or hub id). `dtype` is the
        compute type; by default float32 on the CPU and bfloat16 on an accelerator.
        """
        return cls(load_model(Path(folder), base, dtype))

    def compress(self, documents: Sequence[str]) -> Float[Array, "documents memory hidden"]:
        """One memory per document. Documents longer than the model's limit are cut on the right."""
        return self._encode("compressor", documents)

    def encode_query(
        self, questions: str | Sequence[str], max_length: int | None = None
    ) -> Float[Array, "questions memory hidden"]:
        """Each question in the space of memories, by the query reasoner.

        `max_length` (tokens) is the document limit by default, as in the reference's generation.
        """
        texts = [questions] if isinstance(questions, str) else questions
        return self._encode("query_reasoner", texts, max_length)

    def generate(
        self,
        questions: Sequence[str],
        memories: Float[Array, "rows documents memory hidden"],
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        on_text: OnText | None = None,
    ) -> Generation:
        """Answer each question from its row of memories (made by `compress`; a row may be of no memory at all).

        By default the best token is taken each time. `on_text` is told of each row's text piece by piece, as it
        comes. A prompt is cut on the right to 1,024 tokens, as in the reference (see `Generation.cut`).
        """
        return self._generate([answer_prompt(q) for q in questions], memories, max_new_tokens, sampling, on_text)

    def answer_from_text(
        self,
        questions: Sequence[str],
        documents: Sequence[Sequence[str]],
        max_new_tokens: int = 128,
        prompt_limit: int = 4096,
    ) -> Generation:
        """Answer each question as the base model would, without adapters, from its documents' text in the prompt.

        A prompt of more than `prompt_limit` tokens loses the end of its documents (see `Generation.cut`). Strings such
        as `<s>` in a document are read as special tokens.
        """
        if len(questions) != len(documents):
            fail(f"{len(questions)} questions for {len(documents)} rows of documents", "Give one row per question")
        prompts, cut = [], 0
        for question, row in zip(questions, documents, strict=True):
            prompt, text = answer_prompt(question), "\n\n".join(row)
            ids = self.tokenizer.encode(prompt.text(self.tokenizer, text))
            excess = len(ids) - prompt_limit
            if excess > 0:
                starts = token_starts(self.tokenizer, text)
                # Tokens on the new border may be others than before: a few are given up to be sure.
                text = text[: starts[-excess - 4]] if excess + 4 <= len(starts) else ""
                ids, cut = self.tokenizer.encode(prompt.text(self.tokenizer, text)), cut + 1
            if len(ids) > prompt_limit:
                fail(
                    f"the question that begins with {question[:40]!r} is longer than {prompt_limit} tokens",
                    "Shorten it",
                )
            prompts.append(ids)
        decoder = self.model.decoder.config
        none = np.zeros((len(prompts), 0, self.tokenizer.special.num_memory, decoder.hidden_size), np.float32)
        base = {name: value for name, value in self.params.items() if name in ("base", "memory_tokens")}
        new = self._generator(base, prompts, none, max_new_tokens, GREEDY)
        return Generation([self.tokenizer.decode(row.tolist()) for row in new], new, cut)

    def generate_from_documents(
        self, questions: Sequence[str], documents: Sequence[Sequence[str]], max_new_tokens: int = 128
    ) -> Generation:
        """Answer each question from all of its documents (the reference's generate_from_text)."""
        return self.generate(questions, self._compress_rows(documents), max_new_tokens)

    def generate_from_paraphrase(
        self,
        documents: Sequence[Sequence[str]],
        max_new_tokens: int = 128,
        rng: random.Random | None = None,
    ) -> Generation:
        """Write each row's documents out again, by an instruction drawn with `rng` for every row."""
        rng = rng or random.Random(0)
        prompts = [paraphrase_prompt(rng) for _ in documents]
        return self._generate(prompts, self._compress_rows(documents), max_new_tokens, GREEDY, None)

    def generate_from_questions(
        self,
        questions: Sequence[str],
        documents: Sequence[Sequence[str]],
        max_new_tokens: int = 128,
        k: int | None = None,
    ) -> Generation:
        """Retrieve the `k` best of each question's candidate documents, then answer from them."""
        candidates = self._compress_rows(documents)
        scores = cosine_scores(self.encode_query(questions), candidates)
        k = k or self.top_k
        if k > scores.shape[1]:
            fail(f"k is {k} for {scores.shape[1]} candidate documents", "Give more documents or a smaller k")
        selected = jax.lax.top_k(scores, k)[1]
        memories = jnp.take_along_axis(candidates, selected[:, :, None, None], axis=1)
        answers = self.generate(questions, memories, max_new_tokens)
        return dataclasses.replace(answers, selected=np.asarray(selected), scores=np.asarray(scores))

    def open_stores(
        self,
        *stores: str | Path | MemoryStore,
        device_bytes: int | None = None,
        first_pass: int | None = None,
        factory: str = "Flat",
    ) -> MemoryIndex | FirstPass:
        """Stores that this model's compressor has filled, to be searched as one (see `MemoryIndex`).

        With `first_pass`, only so many candidates that a FAISS index of the kind `factory` gives are scored (see
        `FirstPass`). Raises `UserError` for a store of another model, and where all of them are empty.
        """
        of_model = fingerprint(self.loaded)
        opened = [s if isinstance(s, MemoryStore) else MemoryStore.open(s) for s in stores]
        for store in opened:
            store.settings.require(of_model, store.location)
        index = MemoryIndex(opened, device_bytes=device_bytes)
        if not len(index):
            names = ", ".join(store.location for store in opened)
            fail(f"{names} holds no memories", "Compress a corpus into it first")
        return index if first_pass is None else FirstPass(index, first_pass, factory)

    def answer(
        self,
        questions: str | Sequence[str],
        store: str | Path | MemoryStore | MemoryIndex | FirstPass,
        k: int | None = None,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        on_text: OnText | None = None,
    ) -> list[Answer]:
        """Answer each question from the `k` memories of a store that are nearest to it (default: the model's own k).

        If the store has fewer than `k`, all of them are used. Open a store once with `open_stores` where several
        calls need it. Raises `UserError` for a question that is blank, or so long that the prompt has no room for it.
        """
        asked = [questions] if isinstance(questions, str) else list(questions)
        index = store if isinstance(store, MemoryIndex | FirstPass) else self.open_stores(store)
        k = min(self.top_k if k is None else k, len(index))
        for question in asked:
            self._check_question(question, k)
        clock = [time.perf_counter()]
        queries = np.asarray(self.encode_query(asked))
        clock.append(time.perf_counter())
        found = index.search(queries, k)
        if (found.indices < 0).any():
            fail(
                f"fewer than {k} memories were found for a question",
                "Give more candidates (first_pass), or a smaller k",
            )
        clock.append(time.perf_counter())
        memories = jnp.asarray(index.memories(found.indices.reshape(-1)))
        passages = index.passages(found.indices.reshape(-1))
        clock.append(time.perf_counter())
        of_rows = memories.reshape(len(asked), k, *memories.shape[1:])
        generated = self.generate(asked, of_rows, max_new_tokens, sampling, on_text)
        clock.append(time.perf_counter())
        seconds = dict(zip(("encode", "search", "read", "generate"), np.diff(clock).tolist(), strict=True))
        sources = [
            Source(where, p.document, p.title, p.start, p.end, p.text, float(score))
            for (where, p), score in zip(passages, found.scores.reshape(-1), strict=True)
        ]
        cut = [was_cut for _, was_cut in self.tokenizer.encode_passages(asked, self.doc_max_length)]
        return [
            Answer(question, generated.texts[row], sources[row * k : row * k + k], cut[row], seconds)
            for row, question in enumerate(asked)
        ]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the reference's checkpoint format. Needs the extra `convert` (PyTorch)."""
        with new_folder(Path(folder)) as partial:
            pretrained.save_checkpoint(partial, self.loaded)

    def _check_question(self, question: str, k: int) -> None:
        if not question.strip():
            fail("a question is blank", "Ask something")
        tokens = len(self.tokenizer.encode(answer_prompt(question).text(self.tokenizer, k)))
        if tokens > PROMPT_LIMIT:
            fail(
                f"the question that begins with {question[:40]!r} makes a prompt of {tokens} tokens with {k} memories; "
                f"at most {PROMPT_LIMIT} are read",
                "Shorten it, or take fewer memories",
            )

    def _compress_rows(self, documents: Sequence[Sequence[str]]) -> Float[Array, "rows n memory hidden"]:
        sizes = {len(row) for row in documents}
        if len(sizes) != 1:
            fail(
                f"rows have {sorted(sizes)} documents",
                "Give every question the same number of documents, or call once per question",
            )
        flat = self.compress([document for row in documents for document in row])
        return flat.reshape(len(documents), -1, *flat.shape[1:])

    def _encode(self, role: Role, texts: Sequence[str], max_length: int | None = None) -> Array:
        if not texts:
            fail("there are no texts to encode", "Give at least one")
        passages = self.tokenizer.encode_passages(list(texts), max_length or self.doc_max_length)
        return jnp.asarray(self._encoder(role, [ids for ids, _ in passages]).memories)

    def _generate(
        self,
        prompts: Sequence[Prompt],
        memories: Float[Array | np.ndarray, "rows documents memory hidden"],
        max_new_tokens: int,
        sampling: Sampling,
        on_text: OnText | None,
    ) -> Generation:
        if len(prompts) != memories.shape[0]:
            fail(f"{len(prompts)} prompts for {memories.shape[0]} rows of memories", "Give one row per prompt")
        texts = [prompt.text(self.tokenizer, memories.shape[1]) for prompt in prompts]
        tokens = self.tokenizer.encode_batch(texts)
        cut = sum(len(ids) > PROMPT_LIMIT for ids in tokens)
        tokens = [ids[:PROMPT_LIMIT] for ids in tokens]
        new = self._generator(self.params, tokens, memories, max_new_tokens, sampling, on_text)
        return Generation([self.tokenizer.decode(row.tolist()) for row in new], new, cut)
