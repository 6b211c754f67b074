"""Comparison of recomputed with recorded values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Largest accepted ||difference|| / ||recorded|| per kind of array.
LIMITS = {
    "losses": 1e-5,
    "memories": 1e-5,
    "logits": 1e-5,
    "grads": 5e-5,
    "trained": 1e-4,
}
# Entries of W are 0 or 1 up to rounding of soft - soft.
ABSOLUTE = 1e-6


def kind_of(name: str) -> str:
    """Which limit applies to a float array."""
    name = name.split("::")[-1] if not name.startswith(("grad", "trained")) else name
    if name.startswith("trained"):
        return "trained"
    if name.startswith(("grad", "train_grad", "dlogits")):
        return "grads"
    if name.startswith(("loss", "mse", "total", "train_", "label_nll")):
        return "losses"
    if "logits" in name or name in ("scores", "top2_margin"):
        return "logits"
    return "memories"


@dataclass
class Report:
    """Largest error per kind and everything that should be identical but is not."""

    name: str
    errors: dict[str, float] = field(default_factory=dict)
    worst: dict[str, str] = field(default_factory=dict)
    different: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    identical: int = 0

    def same(self, label: str, found: Any, recorded: Any) -> None:
        """Exact comparison of json-like values."""
        if found == recorded:
            self.identical += 1
        else:
            self.different.append(label)

    def close(self, kind: str, label: str, found: np.ndarray, recorded: np.ndarray) -> None:
        """Relative norm of the difference."""
        gap = float(np.linalg.norm((found.astype(np.float64) - recorded).ravel()))
        size = float(np.linalg.norm(recorded.astype(np.float64).ravel()))
        error = gap / size if size else gap
        if not error <= self.errors.get(kind, -1.0):
            self.errors[kind], self.worst[kind] = error, label

    def array(self, label: str, found: np.ndarray, recorded: np.ndarray) -> None:
        """Integers and booleans exactly, floats by norm."""
        if found.shape != recorded.shape or found.dtype != recorded.dtype:
            self.different.append(f"{label} {found.dtype}{found.shape} != {recorded.dtype}{recorded.shape}")
        elif found.dtype.kind in "ib":
            self.same(label, bool(np.array_equal(found, recorded)), True)
        elif label.endswith("top2_margin"):
            # differences of close logits: measured against a logit difference of one
            self.close("logits", label, found, recorded)
        elif label.endswith("W"):
            self.same(label, bool(np.abs(found - recorded).max() <= ABSOLUTE), True)
        else:
            self.close(kind_of(label), label, found, recorded)

    def print(self) -> int:
        """One line; 1 if something is wrong."""
        over = [k for k, e in self.errors.items() if not e <= LIMITS[k]]
        numbers = " ".join(f"{k} {e:.1e}" for k, e in sorted(self.errors.items()))
        print(f"{self.name}: {numbers} | identical {self.identical}", end="")
        print(f" | note: {'; '.join(self.notes)}" if self.notes else "", end="")
        print(f" | DIFFERENT {self.different}" if self.different else "", end="")
        print(f" | OVER {[(k, self.worst[k]) for k in over]}" if over else "", flush=True)
        return 1 if over or self.different else 0


def compare_arrays(
    name: str, found: Mapping[str, np.ndarray], recorded: Mapping[str, np.ndarray], report: Report | None = None
) -> Report:
    """Compare two sets of arrays by name."""
    report = report or Report(name)
    for missing in sorted(set(found) ^ set(recorded)):
        report.different.append(("extra " if missing in found else "missing ") + missing)
    for key in sorted(set(found) & set(recorded)):
        report.array(key, found[key], recorded[key])
    return report
