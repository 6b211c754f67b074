"""The wording of every prompt and how it becomes chat text."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from .tokens import ClaraTokenizer

SYSTEM_QUESTIONS = (
    "You are a helpful assistant. Given a document, your task is to generate some single "
    "questions to cover all key information of the document and answer them sequentially."
)
SYSTEM_PARAPHRASE = (
    "You are a helpful assistant. Your task is follow the instructions to paraphrase the background information."
)
SYSTEM_ANSWER = (
    "You are a helpful assistant. Your task is to extract relevant information from provided "
    "documents and to answer to questions as briefly as possible."
)

PARAPHRASE_INSTRUCTIONS = [
    "Background: {docs} means the same as",
    "Background: {docs} Can you put the above sentences in your own terms?",
    "Background: {docs} Please provide a reinterpretation of the preceding background text.",
    "These two expressions are equivalent in essence:\n(1) {docs}\n(2)",
    "Background: {docs} is a paraphrase of what?",
    "Background: {docs} Could you give me a different version of the background sentences above?",
    "In other words, background: {docs} is just another way of saying:",
    "You're getting across the same point whether you say background: {docs} or",
    "Background: {docs} After unpacking the ideas in the background information above, we got:",
    "Background: {docs} Please offer a restatement of the background sentences I've just read.",
    "Background: {docs}, which also means:",
    "Strip away the mystery, and you'll find background: {docs} is simply another rendition of:",
    "The essence of background: {docs} is captured again in the following statement:",
]


@dataclass(frozen=True)
class Prompt:
    """Prompt text, and the full text where an answer is known."""

    prompt: str
    full: str | None


def document_slots(tokenizer: ClaraTokenizer, k: int) -> str:
    """Memory placeholders for ``k`` documents, without separators."""
    return ("".join(tokenizer.ids.mem_tokens) + "<SEP>") * k


def chat(tokenizer: ClaraTokenizer, system: str, user: str, answer: str | None) -> Prompt:
    """System, user and answer turns; falls back to one user turn on demand."""
    user = user.replace(":\\ ", ": ")
    turns = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    try:
        return _render(tokenizer, turns, answer)
    except Exception as error:
        if "System role not supported" not in str(error):
            raise
    return _render(tokenizer, [{"role": "user", "content": system + "\n" + user}], answer)


def _render(tokenizer: ClaraTokenizer, turns: list[dict[str, str]], answer: str | None) -> Prompt:
    prompt = tokenizer.render(turns, generation_prompt=True)
    if answer is None:
        return Prompt(prompt, None)
    full = tokenizer.render([*turns, {"role": "assistant", "content": answer}], generation_prompt=False)
    return Prompt(prompt, full)


def answer_prompt(tokenizer: ClaraTokenizer, k: int, question: str, answer: str | None) -> Prompt:
    """stage1_2, stage2 and every question answering entry point."""
    docs = document_slots(tokenizer, k)
    return chat(tokenizer, SYSTEM_ANSWER, f"Background:\n{docs}\n\nQuestion:{question}", answer)


def questions_prompt(tokenizer: ClaraTokenizer, k: int, pairs: list[tuple[str, str]] | None) -> Prompt:
    """stage1: write questions about the document and answer them."""
    answer = None if pairs is None else "\n".join(f"Question: {q}\nAnswer: {a}" for q, a in pairs)
    return chat(tokenizer, SYSTEM_QUESTIONS, f"Background:\n{document_slots(tokenizer, k)}", answer)


def paraphrase_prompt(tokenizer: ClaraTokenizer, k: int, instruction: int, answer: str | None) -> Prompt:
    """stage1: one of the thirteen paraphrase instructions."""
    user = PARAPHRASE_INSTRUCTIONS[instruction].format(docs=document_slots(tokenizer, k))
    return chat(tokenizer, SYSTEM_PARAPHRASE, user, answer)


def draw_instruction() -> int:
    """Index drawn by Python's global ``random.choice``."""
    return random.choice(range(len(PARAPHRASE_INSTRUCTIONS)))


def item_prompt(tokenizer: ClaraTokenizer, stage: str, k: int, item: dict[str, Any]) -> Prompt:
    """Prompt of one training sample of ``stage``."""
    if stage != "stage1":
        return answer_prompt(tokenizer, k, item["question"], item["answer"])
    if item["data_type"] == "paraphrase":
        return paraphrase_prompt(tokenizer, k, draw_instruction(), item["answer"][0])
    return questions_prompt(tokenizer, k, list(zip(item["question"], item["answer"])))
