"""Scores of short answers: exact match, token F1 and cover exact match (the paper's question answering metrics).

All three compare normalised texts. A question may accept several answers; its score is the best over them.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from clara_jax.errors import fail

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
# An answer of this kind is right or wrong: sharing a word with a longer text earns nothing.
_VERDICTS = {"yes", "no", "noanswer"}


def normalise(text: str) -> str:
    """`text` in lower case without ASCII punctuation and English articles, its words one space apart.

    The texts "True" and "False", written exactly so, become "yes" and "no".
    """
    if text in ("True", "False"):
        return "yes" if text == "True" else "no"
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, answer: str) -> float:
    """1.0 where both are the same after normalisation, else 0.0."""
    return float(normalise(prediction) == normalise(answer))


def cover_exact_match(prediction: str, answer: str) -> float:
    """1.0 where every word of `answer` occurs in `prediction`, in any order and number; an empty answer does."""
    return float(set(normalise(answer).split()) <= set(normalise(prediction).split()))


def f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall over words, in [0, 1]; 0.0 where there is no common word.

    Two empty texts have no common word, so that their F1 is 0.0 and their exact match 1.0.
    """
    predicted, wanted = normalise(prediction), normalise(answer)
    if predicted != wanted and (predicted in _VERDICTS or wanted in _VERDICTS):
        return 0.0
    words, wanted_words = predicted.split(), wanted.split()
    common = (Counter(words) & Counter(wanted_words)).total()
    return 2 * common / (len(words) + len(wanted_words)) if common else 0.0


def best(metric: Callable[[str, str], float], prediction: str, accepted: Sequence[str]) -> float:
    """The highest `metric(prediction, answer)` over the accepted answers, of which there must be one."""
    return max(metric(prediction, answer) for answer in accepted)


def score_answers(predictions: Sequence[str], accepted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Means of `em`, `f1` and `cover_em` over all questions, each in [0, 1]; nothing where there are no questions.

    `accepted[i]` are the answers that question i accepts. Raises `UserError` for a question that accepts none, and
    `ValueError` where the two sequences differ in length.
    """
    pairs = list(zip(predictions, accepted, strict=True))
    for number, (_, answers) in enumerate(pairs, start=1):
        if not answers:
            fail(f"question {number} of {len(pairs)} accepts no answer", "Give it an answer, or leave it out")
    if not pairs:
        return {}
    metrics = {"em": exact_match, "f1": f1, "cover_em": cover_exact_match}
    return {name: sum(best(metric, *pair) for pair in pairs) / len(pairs) for name, metric in metrics.items()}
