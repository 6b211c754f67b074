"""Which samples make batch number n: a pure function of the data, the seed and n.

Sources are shuffled anew each epoch and mixed by grain into an endless stream of sample numbers. The stream is taken
in windows of some dozens of batches; within a window, samples of like length come together. Neither the number of
processes nor the batch at which a run goes on has a part in it.
"""

import dataclasses
import functools
import itertools
import threading

import grain
import numpy as np
from jaxtyping import Int

_WINDOW_BATCHES = 64
_lock = threading.Lock()


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingOrder:
    """Endless batches of all samples, a new order in each epoch.

    `sizes` are the samples of each source; a sample's number counts on from source to source. `weights` are the
    shares of the sources in the stream; without them every sample comes once an epoch. `classes` is the length
    class of each sample.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...] | None
    classes: Int[np.ndarray, " samples"]
    batch_size: int
    seed: int

    @property
    def window_batches(self) -> int:
        """Batches in a window: no more than an epoch holds, so that small data does not come together at random."""
        return max(1, min(_WINDOW_BATCHES, sum(self.sizes) // self.batch_size))

    def batch(self, number: int) -> Int[np.ndarray, " batch"]:
        """Numbers of the samples in batch `number`."""
        window, place = divmod(number, self.window_batches)
        with _lock:  # the threads that prepare batches would each work out the same window
            return _window(self, window)[place]

    @functools.cached_property
    def stream(self) -> grain.MapDataset[int]:
        """The endless stream of sample numbers, before batches are made of it."""
        if self.weights is None:
            return _shuffled(range(sum(self.sizes)), self.seed)
        starts = np.cumsum((0, *self.sizes)).tolist()
        parts = [_shuffled(range(a, b), self.seed + i) for i, (a, b) in enumerate(itertools.pairwise(starts))]
        return grain.MapDataset.mix(parts, weights=self.weights)


@dataclasses.dataclass(frozen=True)
class FileOrder:
    """The first `samples` samples in their order, each once; the last batch is filled up with -1."""

    samples: int
    batch_size: int

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def batch(self, number: int) -> Int[np.ndarray, " batch"]:
        """Numbers of the samples in batch `number`."""
        found = np.arange(number * self.batch_size, (number + 1) * self.batch_size)
        return np.where(found < self.samples, found, -1)


@functools.lru_cache(maxsize=8)
def _window(order: TrainingOrder, number: int) -> Int[np.ndarray, "batches batch"]:
    """The batches of one window.

    Sorted by class and cut: what is left of a class joins the next larger one, and every sample has its place.
    """
    size = order.window_batches * order.batch_size
    samples = np.array([order.stream[i] for i in range(number * size, (number + 1) * size)])
    samples = samples[np.argsort(order.classes[samples], kind="stable")]
    batches = samples.reshape(order.window_batches, order.batch_size)
    return np.random.default_rng((order.seed, number)).permutation(batches)


def _shuffled(numbers: range, seed: int) -> grain.MapDataset[int]:
    return grain.MapDataset.source(numbers).seed(seed).shuffle().repeat()
