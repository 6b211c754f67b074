"""Training records of two stages from files of questions and documents, or, where there are none, generated ones."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clara_jax.data.records import Record, parse_record

CANDIDATES = 20
_GENERATED = 300
Fields = dict[str, Any]


def read_topics(paths: Sequence[Path]) -> list[Record]:
    """What files say: lines of this project's records, or SQuAD's format, a paragraph of which is a list of questions.

    Paraphrases are left out.
    """
    topics = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            found = [parse_record(json.loads(line)) for line in text.splitlines()]
        else:
            paragraphs = [p for article in json.loads(text)["data"] for p in article["paragraphs"]]
            found = [
                Record(
                    documents=(paragraph["context"],),
                    questions=tuple(qa["question"] for qa in paragraph["qas"]),
                    answers=tuple(qa["answers"][0]["text"] for qa in paragraph["qas"]),
                    question_list=True,
                    positives=(0,),
                )
                for paragraph in paragraphs
            ]
        topics += [record for record in found if record.questions]
    return topics


def generate_topics() -> list[Record]:
    """Documents of invented words, each with a list of questions.

    Their lengths are log-normal, as those of Wikipedia's paragraphs nearly are: 90 words in the middle, half of them
    between 63 and 128, a few beyond the 256 tokens where documents are cut.
    """
    rng = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstv" for b in ("a", "e", "i", "o", "u", "an", "el", "or")]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(8000)]
    weights = [1 / (rank + 10) for rank in range(len(words))]  # Zipf's law

    def text(length: int) -> str:
        return " ".join(rng.choices(words, weights, k=length))

    topics = []
    for _ in range(_GENERATED):
        pairs = rng.randint(4, 10)
        document = text(min(400, max(10, round(rng.lognormvariate(4.5, 0.53)))))
        questions = tuple(text(rng.randint(6, 16)) + "?" for _ in range(pairs))
        answers = tuple(text(rng.randint(1, 6)) for _ in range(pairs))
        topics.append(Record((document,), questions, answers, question_list=True, positives=(0,)))
    return topics


def records_of(topics: Sequence[Record], stage: str, number: int) -> list[Fields]:
    """At most `number` records for `stage`.

    compression_pretraining: a document with its list of questions. end_to_end: a question with 20 candidates, its own
    documents first, the others drawn from those of the other records. Topics with question lists serve the former,
    those with a single question the latter; a stage that finds none of its own takes all.
    """
    rng = random.Random(0)
    lists = stage == "compression_pretraining"
    chosen = [topic for topic in topics if topic.question_list == lists] or list(topics)
    chosen = rng.sample(chosen, min(number, len(chosen)))
    if lists:
        return [_compression(topic) for topic in chosen]
    pool = list(dict.fromkeys(document for topic in chosen for document in topic.documents))
    if len(pool) < 2 * CANDIDATES:
        raise SystemExit(f"{len(pool)} documents are too few to draw {CANDIDATES} candidates from; give more --records")
    return [_end_to_end(topic, pool, rng) for topic in chosen]


def write_records(path: Path, records: Sequence[Fields]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _compression(topic: Record) -> Fields:
    document = topic.documents[topic.positives[0] if topic.positives else 0]
    answers = topic.answers if topic.question_list else topic.answers[:1]
    return {"data_type": "qa", "question": list(topic.questions), "answers": list(answers), "docs": [document]}


def _end_to_end(topic: Record, pool: list[str], rng: random.Random) -> Fields:
    own = list(topic.documents[:CANDIDATES])
    others = rng.sample([document for document in pool if document not in own], CANDIDATES - len(own))
    positives = [index for index in topic.positives or (0,) if index < len(own)]
    return {"question": topic.questions[0], "answers": [topic.answers[0]], "docs": own + others, "pos_index": positives}
