"""Invented documents, questions and answers."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from . import prompts

_HEADS = ["Ve", "Tam", "Oru", "Kli", "Sa", "Bren", "Ny", "Dro", "Il", "Pha", "Mo", "Gri"]
_TAILS = ["lda", "rek", "mont", "sha", "vik", "nor", "this", "bura", "quen", "pol", "dra", "zé"]
_KINDS = ["harbour clock", "salt mine", "tram line", "choir", "seed bank", "observatory", "paper mill", "canal"]
_STUFF = ["slate", "larch wood", "tin", "red clay", "glass", "cork"]
_TRADES = ["baker", "surveyor", "glazier", "midwife", "organist", "ferryman"]


@dataclass(frozen=True)
class Entry:
    """One document with the questions it answers."""

    title: str
    text: str
    facts: list[tuple[str, str]]


class Writer:
    """A seeded source of documents."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def name(self) -> str:
        """A made-up name."""
        return self._rng.choice(_HEADS) + self._rng.choice(_TAILS)

    def entry(self, sentences: int) -> Entry:
        """A document of a title and ``sentences`` sentences; without any, a very short one."""
        rng, pick = self._rng, self._rng.choice
        kind, place, maker = pick(_KINDS), self.name(), f"{self.name()} {self.name()}"
        year, stuff, count = rng.randint(1400, 1990), pick(_STUFF), rng.randint(3, 980)
        trade, price = pick(_TRADES), rng.randint(2, 90)
        thing = f"{place} {kind}"
        parts = [
            (f"It was begun in {year} by the {trade} {maker}.", f"Who began the {thing}?", maker),
            (f"Most of it is {stuff}; the roof is not.", f"What is most of the {thing} made of?", stuff),
            (
                f"It needs {count} litres of oil a year – “too much”, say some.",
                "How much oil is needed?",
                f"{count} litres",
            ),
            (
                f"A visit costs {price} pence (children: free).",
                f"What does a visit to the {thing} cost?",
                f"{price} pence",
            ),
        ]
        if sentences == 0:
            return Entry(thing, f"{thing}\nClosed.", [(f"Is the {thing} open?", "no")])
        rng.shuffle(parts)
        chosen = parts[:sentences]
        text = f"{thing}\nThe {thing} lies near {self.name()}. " + " ".join(p[0] for p in chosen)
        facts = [(question, answer) for _, question, answer in chosen]
        return Entry(thing, text, facts)


def corpus(seed: int) -> list[str]:
    """Training text for a tokenizer: documents, questions and prompt wording."""
    writer = Writer(seed)
    lines: list[str] = []
    for _ in range(60):
        entry = writer.entry(4)
        lines += [entry.text] + [f"Question: {q}\nAnswer: {a}" for q, a in entry.facts]
    fixed = [prompts.SYSTEM_ANSWER, prompts.SYSTEM_PARAPHRASE, prompts.SYSTEM_QUESTIONS]
    return lines + (fixed + prompts.PARAPHRASE_INSTRUCTIONS) * 8


def _item(docs: list[str], question: Any, answer: Any, kind: str = "qa", pos: list[int] | None = None) -> dict:
    return {"docs": docs, "question": question, "answer": answer, "data_type": kind, "pos_index": pos or []}


def question_items(writer: Writer, sizes: list[int], max_q: int) -> list[dict[str, Any]]:
    """stage1: one document and a list of questions per sample."""
    items = []
    for size in sizes:
        entry = writer.entry(size)
        facts = entry.facts[:max_q]
        items.append(_item([entry.text], [q for q, _ in facts], [a for _, a in facts]))
    return items


def paraphrase_items(writer: Writer, sizes: list[int]) -> list[dict[str, Any]]:
    """stage1: one document and its restatement per sample."""
    items = []
    for size in sizes:
        entry = writer.entry(size)
        answer = "Said again: " + entry.text.split("\n")[1][:70]
        items.append(_item([entry.text], "", [answer], "paraphrase"))
    return items


def answer_items(writer: Writer, n_docs: int, positives: list[list[int]], with_positions: bool) -> list[dict[str, Any]]:
    """stage1_2 and stage2: candidates of mixed length and one question per sample."""
    items = []
    for pos in positives:
        entries = [writer.entry((i + len(items)) % 4) for i in range(n_docs)]
        question, answer = entries[pos[0] if pos else n_docs - 1].facts[0]
        items.append(_item([e.text for e in entries], question, answer, pos=pos if with_positions else []))
    return items
