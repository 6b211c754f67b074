"""Prompt wording. Published checkpoints were trained on these very strings: a changed word is another model."""

import dataclasses
import random

from jinja2 import TemplateError

from clara_jax.data.tokenizer import ClaraTokenizer
from clara_jax.errors import fail

QUESTION_LIST_SYSTEM = (
    "You are a helpful assistant. Given a document, your task is to generate some single questions to cover "
    "all key information of the document and answer them sequentially."
)
PARAPHRASE_SYSTEM = (
    "You are a helpful assistant. Your task is follow the instructions to paraphrase the background information."
)
ANSWER_SYSTEM = (
    "You are a helpful assistant. Your task is to extract relevant information from provided documents and to "
    "answer to questions as briefly as possible."
)
PARAPHRASE_INSTRUCTIONS = (
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
)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One exchange: system and user turn, `{docs}` in the user turn standing for the memories."""

    system: str
    user: str

    def text(self, tokenizer: ClaraTokenizer, documents: int | str, answer: str | None = None) -> str:
        """The prompt through the chat template, with that number of memories, or with text in their place.

        With `answer`, the whole exchange. A template that refuses a system turn gets system and user as one user turn.
        Any other template error is a `UserError`.
        """
        before, after = self.user.split("{docs}", 1)
        background = documents if isinstance(documents, str) else tokenizer.memory_text * documents
        # The reference rewrites colon-backslash-space in the user turn (and not in the answer).
        user = before + background + after.replace(":\\ ", ": ")
        turns = [{"role": "system", "content": self.system}, {"role": "user", "content": user}]
        reply = [] if answer is None else [{"role": "assistant", "content": answer}]
        merged = [{"role": "user", "content": f"{self.system}\n{user}"}]
        try:
            try:
                return tokenizer.chat(turns + reply, generation_prompt=answer is None)
            except TemplateError as error:
                if "System role not supported" not in str(error):
                    raise
                return tokenizer.chat(merged + reply, generation_prompt=answer is None)
        except (TemplateError, TypeError, ValueError) as error:
            fail(
                f"{tokenizer.folder}: the chat template fails on a prompt ({error})",
                "Use a template that accepts a system turn, or that says 'System role not supported'",
            )


def question_list_prompt() -> Prompt:
    """Stage 1: write questions that cover the document, and answer them."""
    return Prompt(QUESTION_LIST_SYSTEM, "Background:\n{docs}")


def question_list_answer(questions: list[str], answers: list[str]) -> str:
    """The target of `question_list_prompt`."""
    return "\n".join(f"Question: {q}\nAnswer: {a}" for q, a in zip(questions, answers, strict=True))


def paraphrase_prompt(rng: random.Random) -> Prompt:
    """Stage 1: paraphrase the document, by an instruction drawn with `rng`."""
    return Prompt(PARAPHRASE_SYSTEM, rng.choice(PARAPHRASE_INSTRUCTIONS))


def answer_prompt(question: str) -> Prompt:
    """Instruction tuning, end to end and inference: answer a question from documents."""
    # Braces of the question must survive the replacement of {docs}, which is plain text replacement.
    return Prompt(ANSWER_SYSTEM, "Background:\n{docs}\n\nQuestion:" + question)
