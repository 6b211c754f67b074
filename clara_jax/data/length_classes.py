"""A few batch shapes, chosen from the data: little padding, and as many compilations as there are shapes.

Samples are sorted by their padded size and the sorted order is cut into classes where that leaves the fewest padded
columns. Shapes grow from class to class in every dimension, so that a sample fits its class and every larger one.
"""

import dataclasses

import numpy as np
from jaxtyping import Int

# Borders of classes are looked for between so many equal parts of the sorted samples.
_BLOCKS = 256
MULTIPLE = 8


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the samples of a batch are padded to: columns of a document (with its memory tokens), of the prompt with
    its answer, of the answer, of a question (0 without one); and the memories in a prompt.
    """

    candidates: int
    document: int
    prompt: int
    targets: int
    question: int
    slots: int

    @property
    def columns(self) -> int:
        """Columns that the model computes per sample."""
        return self.candidates * self.document + self.prompt + self.question


@dataclasses.dataclass(frozen=True, eq=False)
class LengthClasses:
    """The shapes, smallest first, and the class of each sample: the smallest one that holds it."""

    shapes: tuple[Shape, ...]
    of: Int[np.ndarray, " samples"]


def choose_classes(
    lengths: Int[np.ndarray, "samples 5"],
    caps: tuple[int, int, int, int],
    number: int,
    top_k: int | None = None,
) -> LengthClasses:
    """At most `number` classes for samples of these lengths (see `tokenized.LENGTHS`), token lengths at most `caps`.

    With `top_k` (retrieval) every shape has at least so many candidates, and just so many slots; else a slot for
    each document. Minimises, over the places of the borders, the sum over samples of the columns of their class.
    """
    candidates = np.maximum(lengths[:, :1], top_k or 0)
    tokens = np.minimum(-(-lengths[:, 1:] // MULTIPLE) * MULTIPLE, np.array(caps, lengths.dtype))
    padded = np.concatenate([candidates, tokens], axis=1)
    order = np.argsort(_columns(padded), kind="stable")
    blocks = np.array_split(order, min(_BLOCKS, len(order)))
    # A class that ends with block j must hold all samples up to there, as the classes below it fit too.
    largest = np.maximum.accumulate([padded[block].max(axis=0) for block in blocks])
    ends = _best_ends(np.array([len(block) for block in blocks]), _columns(largest), number)
    chosen = largest[ends]
    fits = (padded[:, None, :] <= chosen[None, :, :]).all(axis=2)
    shapes = tuple(
        Shape(candidates, document, prompt, targets, question, top_k or candidates)
        for candidates, document, prompt, targets, question in chosen.tolist()
    )
    return LengthClasses(shapes, fits.argmax(axis=1).astype(np.int32))


def _columns(sizes: Int[np.ndarray, "rows 5"]) -> Int[np.ndarray, " rows"]:
    candidates, document, prompt, _, question = sizes.T.astype(np.int64)
    return candidates * document + prompt + question


def _best_ends(sizes: Int[np.ndarray, " blocks"], columns: Int[np.ndarray, " blocks"], number: int) -> list[int]:
    """The last block of each class, for the fewest columns in all, by dynamic programming.

    cost[k][j] = min over i < j of cost[k - 1][i] + (samples of blocks i + 1 .. j) * columns[j]
    """
    total = np.cumsum(sizes)
    between = np.tril(total[:, None] - total[None, :], -1).astype(np.float64)
    cost = (total * columns).astype(np.float64)
    costs, previous = [cost], []
    for _ in range(1, min(number, len(sizes))):
        step = between * columns[:, None] + np.where(np.tri(len(sizes), k=-1, dtype=bool), costs[-1][None, :], np.inf)
        previous.append(step.argmin(axis=1))
        costs.append(step.min(axis=1))
    # The fewest classes that reach the minimum: one more would be compiled for nothing.
    classes = int(np.argmin([cost[-1] for cost in costs]))
    ends = [len(sizes) - 1]
    for step in reversed(previous[:classes]):
        ends.append(int(step[ends[-1]]))
    return ends[::-1]
