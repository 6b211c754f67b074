"""From a record's text to token lists, by stage."""

import dataclasses
import random

from clara_jax.data.collate import Exchange
from clara_jax.data.prompts import (
    Prompt,
    answer_prompt,
    paraphrase_prompt,
    question_list_answer,
    question_list_prompt,
)
from clara_jax.data.records import Record
from clara_jax.data.tokenizer import ClaraTokenizer
from clara_jax.errors import fail


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
class Sample:
    """One tokenised record. `slots` memories stand in the exchange's prompt; `cut` texts were too long."""

    documents: list[list[int]]
    exchange: Exchange
    slots: int
    question: list[int] | None = None
    positives: tuple[int, ...] | None = None
    cut: int = 0


def compression_sample(record: Record, tokenizer: ClaraTokenizer, limits: Limits, rng: random.Random) -> Sample:
    """Stage 1: write the document's questions with answers, or paraphrase it by an instruction drawn with `rng`."""
    if record.data_type == "paraphrase":
        prompt, answer = paraphrase_prompt(rng), record.answers[0]
    else:
        prompt = question_list_prompt()
        answers = record.answers if record.question_list else record.answers[:1]
        answer = question_list_answer(list(record.questions), list(answers))
    return _sample(record, tokenizer, limits, prompt, answer, len(record.documents))


def instruction_sample(record: Record, tokenizer: ClaraTokenizer, limits: Limits, rng: random.Random) -> Sample:
    """Instruction tuning: answer the question from all of the record's documents."""
    prompt = answer_prompt(_question(record))
    return _sample(record, tokenizer, limits, prompt, record.answers[0], len(record.documents))


def retrieval_sample(record: Record, tokenizer: ClaraTokenizer, limits: Limits, top_k: int) -> Sample:
    """End to end and retrieval: the question beside its candidates, `top_k` of which will be in the prompt."""
    slots = min(top_k, len(record.documents))
    prompt = answer_prompt(_question(record))
    sample = _sample(record, tokenizer, limits, prompt, record.answers[0], slots)
    question, cut = tokenizer.encode_passage(_question(record), limits.question)
    return dataclasses.replace(sample, question=question, positives=record.positives, cut=sample.cut + cut)


def _question(record: Record) -> str:
    if not record.questions:
        fail(
            f"a {record.data_type} record has no field 'question', which this stage needs",
            "Use such records in compression_pretraining only",
        )
    return record.questions[0]


def _sample(
    record: Record, tokenizer: ClaraTokenizer, limits: Limits, prompt: Prompt, answer: str, slots: int
) -> Sample:
    passages = [tokenizer.encode_passage(document, limits.document) for document in record.documents]
    whole = tokenizer.encode(prompt.text(tokenizer, slots, answer))
    # As the reference does, the prompt's length is taken from its own tokenisation.
    prompt_length = len(tokenizer.encode(prompt.text(tokenizer, slots)))
    tokens = whole[: limits.prompt]
    return Sample(
        documents=[ids for ids, _ in passages],
        exchange=Exchange(tokens, min(prompt_length, len(tokens))),
        slots=slots,
        cut=sum(was_cut for _, was_cut in passages) + (len(whole) > limits.prompt),
    )
