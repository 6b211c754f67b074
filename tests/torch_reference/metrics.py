"""Answer and retrieval metrics."""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import Any

_PUNCTUATION = set(string.punctuation)


def squash(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in _PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def normalise(text: str) -> str:
    """``squash`` with exact "True" and "False" read as yes and no."""
    return {"True": "yes", "False": "no"}.get(text) or squash(text)


def f1(prediction: str, truth: str) -> float:
    """Token F1; nothing for a mismatch that involves yes, no or noanswer."""
    words = normalise(prediction), normalise(truth)
    if words[0] != words[1] and {"yes", "no", "noanswer"} & set(words):
        return 0.0
    found, wanted = words[0].split(), words[1].split()
    common = sum((Counter(found) & Counter(wanted)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(found), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def pair(prediction: str, truth: str) -> dict[str, Any]:
    """Every answer metric of one prediction."""
    found, wanted = normalise(prediction), normalise(truth)
    return {
        "prediction": prediction,
        "ground_truth": truth,
        "normalized_prediction": found,
        "normalized_ground_truth": wanted,
        "normalize_answer_prediction": squash(prediction),
        "exact_match": found == wanted,
        "cover_exact_match": set(wanted.split()) <= set(found.split()),
        "f1": f1(prediction, truth),
    }


def retrieval(pos: list[list[int]], pred: list[list[int]], k_values: list[int]) -> dict[str, Any]:
    """Recall and precision at k over the samples that have positives."""
    rows = [(set(p), q) for p, q in zip(pos, pred) if p]
    found: dict[str, float] = {}
    for k in k_values:
        hits = [len(p & set(q[:k])) for p, q in rows]
        found[f"recall_{k}"] = _mean([h / len(p) for h, (p, _) in zip(hits, rows)])
    for k in k_values:
        found[f"precision_{k}"] = _mean([len(p & set(q[:k])) / k for p, q in rows])
    return {"pos": pos, "pred": pred, "k_values": k_values, "metrics": found, "valid_samples": len(rows)}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
