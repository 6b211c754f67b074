"""From a record's text to token lists, by stage."""

import dataclasses
import random
from collections.abc import Sequence
from typing import Literal

from clara_jax.data.prompts import (
    Prompt,
    answer_prompt,
    paraphrase_prompt,
    question_list_answer,
    question_list_prompt,
)
from clara_jax.data.records import FieldError, Record
from clara_jax.data.tokenizer import ClaraTokenizer

SampleKind = Literal["compression", "instruction", "retrieval"]


@dataclasses.dataclass(frozen=True)
class Limits:
    """Longest inputs in tokens; what is longer is cut on the right, and counted.

    Args:
        document: Text of a document (3 layout tokens and the memory tokens come on top).
        question: Text of a question read by the query reasoner (the same on top).
        prompt: Prompt and answer read by the generator.

    """

    document: int = 256
    question: int = 256
    prompt: int = 1024


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A tokenised prompt with its answer: `tokens[prompt_length:]` are the targets."""

    tokens: list[int]
    prompt_length: int


@dataclasses.dataclass(frozen=True)
class Sample:
    """One tokenised record.

    `slots` memories stand in the exchange's prompt; `cut` texts were too long. `answers` are the texts that
    a generated answer may be compared with: the record's accepted ones, or the text of a question list.
    """

    documents: list[list[int]]
    exchange: Exchange
    slots: int
    question: list[int] | None = None
    positives: tuple[int, ...] | None = None
    cut: int = 0
    answers: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class SampleTexts:
    """A record as one stage reads it, not tokenised yet; the fields are those of `Sample`."""

    documents: tuple[str, ...]
    prompt: Prompt
    answer: str
    slots: int
    answers: tuple[str, ...]
    question: str | None = None
    positives: tuple[int, ...] | None = None


def sample_texts(record: Record, kind: SampleKind, top_k: int, rng: random.Random) -> SampleTexts:
    """What `record` says in a stage that reads samples of `kind`.

    compression: write the document's questions with answers, or paraphrase it by an instruction drawn with `rng`.
    instruction: answer the question from all of the record's documents.
    retrieval: the question beside its candidates, `top_k` of which will be in the prompt.
    Raises `FieldError` for a record without the question that the stage needs.
    """
    documents, answers = record.documents, record.answers
    if kind == "compression":
        if record.data_type == "paraphrase":
            return SampleTexts(documents, paraphrase_prompt(rng), answers[0], len(documents), answers)
        written = answers if record.question_list else answers[:1]
        target = question_list_answer(list(record.questions), list(written))
        return SampleTexts(documents, question_list_prompt(), target, len(documents), (target,))
    if not record.questions:
        raise FieldError("field 'question' is missing; paraphrase rows belong to compression_pretraining")
    question = record.questions[0]
    if kind == "instruction":
        return SampleTexts(documents, answer_prompt(question), answers[0], len(documents), answers)
    slots = min(top_k, len(documents))
    return SampleTexts(documents, answer_prompt(question), answers[0], slots, answers, question, record.positives)


def tokenize_texts(texts: Sequence[SampleTexts], tokenizer: ClaraTokenizer, limits: Limits) -> list[Sample]:
    """Their samples; all texts of one sort pass the tokenizer in one call, which uses every core."""
    documents = iter(tokenizer.encode_passages([d for t in texts for d in t.documents], limits.document))
    questions = iter(tokenizer.encode_passages([t.question for t in texts if t.question is not None], limits.question))
    wholes = tokenizer.encode_batch([t.prompt.text(tokenizer, t.slots, t.answer) for t in texts])
    # As the reference does, the prompt's length is taken from its own tokenisation.
    prompts = tokenizer.encode_batch([t.prompt.text(tokenizer, t.slots) for t in texts])
    samples = []
    for text, whole, prompt in zip(texts, wholes, prompts, strict=True):
        passages = [next(documents) for _ in text.documents]
        question, question_cut = (None, False) if text.question is None else next(questions)
        tokens = whole[: limits.prompt]
        samples.append(
            Sample(
                documents=[ids for ids, _ in passages],
                exchange=Exchange(tokens, min(len(prompt), len(tokens))),
                slots=text.slots,
                question=question,
                positives=text.positives,
                cut=sum(cut for _, cut in passages) + question_cut + (len(whole) > limits.prompt),
                answers=text.answers,
            )
        )
    return samples


def compression_sample(record: Record, tokenizer: ClaraTokenizer, limits: Limits, rng: random.Random) -> Sample:
    """The record's sample of kind compression, see `sample_texts`."""
    return tokenize_texts([sample_texts(record, "compression", 0, rng)], tokenizer, limits)[0]


def instruction_sample(record: Record, tokenizer: ClaraTokenizer, limits: Limits, rng: random.Random) -> Sample:
    """The record's sample of kind instruction, see `sample_texts`."""
    return tokenize_texts([sample_texts(record, "instruction", 0, rng)], tokenizer, limits)[0]


def retrieval_sample(record: Record, tokenizer: ClaraTokenizer, limits: Limits, top_k: int) -> Sample:
    """The record's sample of kind retrieval, see `sample_texts`."""
    return tokenize_texts([sample_texts(record, "retrieval", top_k, random.Random(0))], tokenizer, limits)[0]
