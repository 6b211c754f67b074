"""Rankings and relevant documents in TREC's text files, which trec_eval and its like read.

A run has lines `question Q0 document rank score tag`, a table of relevant documents (qrels) `question 0 document 1`.
"""

import itertools
import math
import re
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from clara_jax.errors import fail
from clara_jax.files import replace_text
from clara_jax.scoring.fields import read_lines
from clara_jax.scoring.rankings import Ranking

_RUN_LINE = "It must be: question Q0 document rank score tag"


def escaped(identity: str) -> str:
    """An id as one word: whitespace and the percent sign are percent-encoded; `urllib.parse.unquote` gives it back."""
    return re.sub(r"[\s%]", lambda found: urllib.parse.quote(found[0], safe=""), identity)


def write_run(path: Path, rankings: Mapping[str, Ranking], tag: str) -> None:
    """Write a ranking per question, best first, with ranks from 1 and scores in full precision.

    `tag` names the system. Other programs order by score: documents of equal scores may change places there. Raises
    `UserError` for an id or tag that is empty or holds whitespace, and where the file cannot be written; `ValueError`
    for scores that rise down a ranking or are not finite.
    """
    lines = []
    _check_words([tag], path)
    for question, ranking in rankings.items():
        _check_words([question, *(document for document, _ in ranking)], path)
        scores = [float(score) for _, score in ranking]
        if not all(map(math.isfinite, scores)) or any(b > a for a, b in itertools.pairwise(scores)):
            raise ValueError(f"the scores of question {question!r} must be finite and fall down its ranking")
        lines += [
            f"{question} Q0 {document} {rank} {score!r} {tag}\n"
            for rank, ((document, _), score) in enumerate(zip(ranking, scores, strict=True), 1)
        ]
    _write(path, lines)


def read_run(path: Path) -> dict[str, list[tuple[str, float]]]:
    """The ranking of each question of a run file: by falling score, equal scores by their rank in the file.

    Raises `UserError` with file and line for a line of another form and a document that a question ranks twice.
    """
    found: dict[str, dict[str, tuple[float, int]]] = {}
    for where, line in read_lines(path):
        words = line.split()
        if len(words) != 6:
            fail(f"{where}: {len(words)} words", _RUN_LINE)
        question, _, document, rank, score, _ = words
        documents = found.setdefault(question, {})
        if document in documents:
            fail(f"{where}: question {question!r} ranks document {document!r} twice", "Keep the better of the two")
        documents[document] = (_score(score, where), _rank(rank, where))
    return {
        question: [
            (document, score)
            for document, (score, _) in sorted(documents.items(), key=lambda item: (-item[1][0], item[1][1]))
        ]
        for question, documents in found.items()
    }


def write_qrels(path: Path, relevant: Mapping[str, Sequence[str]]) -> None:
    """Write the relevant documents of each question, all of relevance 1. Questions without any have no line.

    Raises `UserError` for an id that is empty or holds whitespace, and where the file cannot be written.
    """
    for question, documents in relevant.items():
        _check_words([question, *documents], path)
    _write(path, [f"{question} 0 {document} 1\n" for question, found in relevant.items() for document in found])


def _check_words(words: Iterable[str], path: Path) -> None:
    for word in words:
        if len(word.split()) != 1 or word != word.strip():
            fail(f"{path}: {word!r} is not a word", "Ids and tags of a TREC file must not be empty or hold whitespace")


def _write(path: Path, lines: Sequence[str]) -> None:
    try:
        replace_text(path, "".join(lines))
    except OSError as error:
        fail(f"{path} cannot be written ({error.strerror})", "Name a file in a folder that you can write to")


def _score(word: str, where: str) -> float:
    try:
        score = float(word)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        fail(f"{where}: the score is {word!r}", "It must be a finite number")
    return score


def _rank(word: str, where: str) -> int:
    if not word.isdecimal():
        fail(f"{where}: the rank is {word!r}", "It must be a whole number")
    return int(word)
