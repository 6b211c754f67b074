"""The systems that answer: the model, and controls that show what its memories are worth.

All of them get the same documents for a question. The controls are: the text itself in the base model's prompt;
the text cut to as many tokens as a memory has; no memory at all; memories of another question's documents.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from clara_jax.clara import Clara, Generation
from clara_jax.corpus.passages import token_starts
from clara_jax.data.tokenizer import ClaraTokenizer
from clara_jax.errors import fail
from clara_jax.evaluation.memories import Memories
from clara_jax.progress import CountProgress
from clara_jax.scoring.candidates import Candidate
from clara_jax.scoring.questions import Question

_BATCH = 16  # questions answered together
SYSTEMS = ("memory", "text", "truncated_text", "no_memory", "wrong_memory")


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question and the documents that it is answered from: its `used` ones, and `wrong` ones as many if possible."""

    question: Question
    used: tuple[str, ...]
    wrong: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How answers are generated, greedily. Lengths in tokens; the limit is of the prompts that hold text."""

    max_new_tokens: int = 32
    prompt_limit: int = 4096

    def __post_init__(self) -> None:
        """Refuse numbers below 1."""
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                fail(f"{field.name} is {getattr(self, field.name)}", "Give at least 1")


@dataclasses.dataclass(frozen=True)
class Predictions:
    """A system's answer to each question, by id, and how many prompts were too long and lost tokens."""

    texts: dict[str, str]
    cut: int


def with_wrong_documents(
    questions: Sequence[Question], used: Mapping[str, Sequence[str]], seed: int, systems: Sequence[str] = SYSTEMS
) -> list[Asked]:
    """Each question with its documents and, for `wrong_memory`, as many of other questions.

    They are those of the question at a place drawn with `seed`, and of the ones after it if that gives too few; none is
    used by or a document of the question itself. Raises `UserError` for a question to which there is no such document.
    """
    rng = np.random.default_rng(seed)
    asked = []
    for question in questions:
        keys = tuple(used[question.id])
        if "wrong_memory" not in systems:
            asked.append(Asked(question, keys))
            continue
        mine = {*keys, *(document.id for document in question.documents), *question.relevant}
        start = int(rng.integers(len(questions)))
        wrong: dict[str, None] = {}
        for step in range(len(questions)):
            other = questions[(start + step) % len(questions)]
            wrong.update(dict.fromkeys(key for key in used[other.id] if key not in mine))
            if len(wrong) >= len(keys):
                break
        if keys and not wrong:
            fail(
                f"wrong_memory has no document for question {question.id!r}: all that other questions use are its own",
                "Evaluate more questions, or leave wrong_memory out of systems",
            )
        asked.append(Asked(question, keys, tuple(wrong)[: len(keys)]))
    return asked


def answer(
    system: str,
    clara: Clara,
    memories: Memories,
    documents: Mapping[str, Candidate],
    asked: Sequence[Asked],
    decoding: Decoding,
) -> Predictions:
    """The answers of one of `SYSTEMS`; questions with equally many documents are answered together."""

    def texts_of(one: Asked) -> list[str]:
        texts = [documents[key].content for key in one.used]
        return texts if system == "text" else [first_tokens(text, clara.tokenizer) for text in texts]

    def from_text(rows: Sequence[Asked]) -> Generation:
        questions = [one.question.text for one in rows]
        return clara.answer_from_text(
            questions, [texts_of(one) for one in rows], decoding.max_new_tokens, decoding.prompt_limit
        )

    def from_memories(rows: Sequence[Asked]) -> Generation:
        keys = [_memory_keys(system, one) for one in rows]
        width = clara.tokenizer.special.num_memory, clara.model.decoder.config.hidden_size
        flat = [key for row in keys for key in row]
        flat_rows = memories.of(flat) if flat else np.zeros((0, *width), np.float32)
        of_rows = jnp.asarray(flat_rows).reshape(len(rows), len(keys[0]), *width)
        return clara.generate([one.question.text for one in rows], of_rows, decoding.max_new_tokens)

    if system in ("text", "truncated_text"):
        return _in_batches(system, asked, from_text, lambda one: 0, lambda one: sum(map(len, texts_of(one))))
    wanted = [key for one in asked for key in _memory_keys(system, one)]
    if wanted:
        memories.of(wanted)  # all at once, so that documents are batched by length
    number = {one.question.id: len(_memory_keys(system, one)) for one in asked}
    return _in_batches(
        system, asked, from_memories, lambda one: number[one.question.id], lambda one: len(one.question.text)
    )


def first_tokens(text: str, tokenizer: ClaraTokenizer) -> str:
    """The beginning of a text, as many tokens as a memory has."""
    starts, budget = token_starts(tokenizer, text), tokenizer.special.num_memory
    return text[: int(starts[budget])] if len(starts) > budget else text


def _memory_keys(system: str, one: Asked) -> tuple[str, ...]:
    return {"memory": one.used, "no_memory": (), "wrong_memory": one.wrong}[system]


def _in_batches(
    system: str,
    asked: Sequence[Asked],
    generate: Callable[[Sequence[Asked]], Generation],
    group: Callable[[Asked], int],
    length: Callable[[Asked], int],
) -> Predictions:
    groups: dict[int, list[Asked]] = {}
    for one in asked:
        groups.setdefault(group(one), []).append(one)
    texts: dict[str, str] = {}
    cut = 0
    progress = CountProgress(len(asked), f"{system} answer")
    for rows in groups.values():
        ordered = sorted(rows, key=length)
        for start in range(0, len(ordered), _BATCH):
            batch = ordered[start : start + _BATCH]
            made = generate(batch)
            texts.update({one.question.id: text for one, text in zip(batch, made.texts, strict=True)})
            cut += made.cut
            progress.advance(len(batch))
    progress.close()
    return Predictions(texts, cut)
