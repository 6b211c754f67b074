"""Batches of chats about the small world, from text, for training and measuring the tiny base.

The wording is that of `clara_jax.data.prompts`, with the documents' text, one a line, where CLaRa puts memories.
"""

import dataclasses
import random

import numpy as np
from jaxtyping import Bool, Int

from clara_jax.data.prompts import (
    Prompt,
    answer_prompt,
    paraphrase_prompt,
    question_list_answer,
    question_list_prompt,
)
from clara_jax.data.tokenizer import ClaraTokenizer
from experiments.small_world.tokenizer import ASSISTANT
from experiments.small_world.words import KINDS
from experiments.small_world.world import Entity, World, ask, ask_two_hop, distractors, strangers

Turns = list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class TextBatch:
    """Token rows; `targets[row, i]` marks a token that an answer consists of (its end token included)."""

    tokens: Int[np.ndarray, "batch length"]
    valid: Bool[np.ndarray, "batch length"]
    targets: Bool[np.ndarray, "batch length"]


@dataclasses.dataclass(frozen=True)
class Mix:
    """What the chats of a batch are.

    A chat has between `documents[0]` and `documents[1]` documents and `turns` questions, each about any fact of any
    of its documents. (They are drawn with replacement: answers already given do not tell which one is next.) A share
    `two_hop` of the chats has one two-hop question instead, with both its documents and others up to the most; a share
    `formats` asks for a question list or a paraphrase of one document. With `strangers` the documents are about
    entities of one kind whose names share no word, so that one word of a name tells them apart.
    """

    documents: tuple[int, int]
    turns: int = 1
    two_hop: float = 0.0
    formats: float = 0.0
    strangers: bool = False


def draw_chats(world: World, mix: Mix, count: int, tokenizer: ClaraTokenizer, rng: random.Random) -> list[str]:
    """`count` whole chats of `mix`, through the chat template."""
    chats = []
    for _ in range(count):
        kind = rng.random()
        entity = rng.choice(world.by_kind[rng.choice(KINDS)])
        if kind < mix.two_hop:
            chat = two_hop_chat(world, entity, rng.randint(2, max(2, mix.documents[1])), rng)
        elif kind < mix.two_hop + mix.formats:
            chat = format_chat(entity, rng)
        else:
            others = rng.randint(*mix.documents) - 1
            found = (
                strangers(world, entity, others, rng) if mix.strangers else distractors(world, (entity,), others, rng)
            )
            chat = answer_chat([entity, *found], mix.turns, rng)
        chats.append(_render(*chat, tokenizer))
    return chats


def answer_chat(entities: list[Entity], turns: int, rng: random.Random) -> tuple[Prompt, Turns]:
    """Questions about some of the entities, all of whose documents are in the prompt, in random order."""
    rng.shuffle(entities)
    asked = [rng.choice(entities) for _ in range(turns)]
    questions = [ask(one, rng.choice(list(one.facts)), rng) for one in asked]
    prompt = _with_documents(answer_prompt(questions[0].text), [_text(one, rng) for one in entities])
    return prompt, [(question.text, question.answer) for question in questions]


def two_hop_chat(world: World, entity: Entity, documents: int, rng: random.Random) -> tuple[Prompt, Turns]:
    """One two-hop question that starts from `entity`; both documents that it needs are in the prompt."""
    question = ask_two_hop(world, entity, rng)
    entities = [*question.path, *distractors(world, question.path, documents - 2, rng)]
    rng.shuffle(entities)
    prompt = _with_documents(answer_prompt(question.text), [_text(one, rng) for one in entities])
    return prompt, [(question.text, question.answer)]


def format_chat(entity: Entity, rng: random.Random) -> tuple[Prompt, Turns]:
    """A question list or a paraphrase of the entity's document."""
    texts = [entity.document, entity.paraphrase]
    rng.shuffle(texts)
    if rng.random() < 0.5:
        return _with_documents(paraphrase_prompt(rng), texts[:1]), [("", texts[1])]
    names = rng.sample(list(entity.facts), len(entity.facts))
    questions = [ask(entity, name, rng) for name in names]
    answer = question_list_answer([q.text for q in questions], [q.answer for q in questions])
    return _with_documents(question_list_prompt(), texts[:1]), [("", answer)]


def pad_chats(chats: list[str], tokenizer: ClaraTokenizer, length: int) -> Int[np.ndarray, "batch length"]:
    """Tokens of chats, padded on the right to `length`; a longer chat is an error."""
    rows = tokenizer.backend(chats, add_special_tokens=False)["input_ids"]
    tokens = np.full((len(rows), length), tokenizer.special.pad, np.uint16)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens


def mark_answers(tokens: Int[np.ndarray, "batch length"], tokenizer: ClaraTokenizer) -> TextBatch:
    """Padded chats with their answers marked."""
    assistant = tokenizer.encode(ASSISTANT)[0]
    # An answer lasts from the token after <|assistant|> to the end token.
    opened = np.cumsum(tokens == assistant, axis=1) - np.cumsum(tokens == tokenizer.special.eos, axis=1)
    valid = tokens != tokenizer.special.pad
    targets = np.zeros_like(valid)
    targets[:, 1:] = opened[:, :-1] > 0
    return TextBatch(tokens.astype(np.int32), valid, targets & valid)


def _text(entity: Entity, rng: random.Random) -> str:
    return rng.choice((entity.document, entity.paraphrase))


def _with_documents(prompt: Prompt, texts: list[str]) -> Prompt:
    return dataclasses.replace(prompt, user=prompt.user.replace("{docs}", "\n".join(texts)))


def _render(prompt: Prompt, turns: Turns, tokenizer: ClaraTokenizer) -> str:
    messages = [
        {"role": "system", "content": prompt.system},
        {"role": "user", "content": prompt.user},
        {"role": "assistant", "content": turns[0][1]},
    ]
    for question, answer in turns[1:]:
        messages.append({"role": "user", "content": f"Question:{question}"})
        messages.append({"role": "assistant", "content": answer})
    return tokenizer.chat(messages, generation_prompt=False)
