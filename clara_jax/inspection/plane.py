"""Mean memory states and mean document states, the two sides of the alignment loss, in one plane."""

import csv
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jaxtyping import Array, Float

from clara_jax.corpus.documents import read_documents
from clara_jax.corpus.passages import cut_passages
from clara_jax.data.collate import pad_encoder_inputs
from clara_jax.encoding import text_batches
from clara_jax.errors import fail, require_package
from clara_jax.models.roles import EncoderInputs, Params, RoleModel
from clara_jax.pretrained import Pretrained

Method = Literal["pca", "tsne"]
_FEWEST = 3
_BATCH_TOKENS = 8192


@dataclasses.dataclass(frozen=True)
class Means:
    """Mean states of documents, float32. `cut` of them are longer than the limit: their first passages were read."""

    ids: list[str]
    document: Float[np.ndarray, "documents hidden"]
    memory: Float[np.ndarray, "documents hidden"]
    cut: int

    def cosine(self) -> float:
        """Mean over documents of the cosine between its two means."""
        lengths = np.linalg.norm(self.document, axis=1) * np.linalg.norm(self.memory, axis=1)
        return float(np.mean((self.document * self.memory).sum(axis=1) / np.maximum(lengths, 1e-12)))

    def distance(self) -> float:
        """Mean over documents of the Euclidean distance between its two means."""
        return float(np.mean(np.linalg.norm(self.document - self.memory, axis=1)))


@dataclasses.dataclass(frozen=True)
class Plane:
    """Both means of every document in two dimensions; for PCA the shares of the variance that its axes explain."""

    document: Float[np.ndarray, "documents 2"]
    memory: Float[np.ndarray, "documents 2"]
    explained: tuple[float, float] | None


def mean_states(loaded: Pretrained, corpus: Sequence[str], documents: int) -> Means:
    """The means of the first `documents` documents of a corpus, each read by the compressor up to its limit.

    Raises `UserError` for fewer than three documents, and as `read_documents` does.
    """
    if documents < _FEWEST:
        fail(f"--documents is {documents}", f"Give at least {_FEWEST}")
    tokenizer, limit = loaded.tokenizer, loaded.checkpoint.doc_max_length
    taken = list(itertools.islice(read_documents(corpus), documents))
    if len(taken) < _FEWEST:
        fail(f"{', '.join(corpus)}: {len(taken)} documents make no map", f"Give at least {_FEWEST}")
    passages = [cut_passages(document, tokenizer, limit, 0) for document in taken]
    texts = [ids for ids, _ in tokenizer.encode_passages([p[0].titled_text for p in passages], limit)]
    sizes = np.array([len(ids) for ids in texts]) + tokenizer.special.num_memory
    of_document, of_memory = np.empty((2, len(texts), loaded.model.decoder.config.hidden_size), np.float32)
    means = _means(loaded.model)
    for batch in text_batches(sizes, _BATCH_TOKENS, int(sizes.max())):
        inputs = pad_encoder_inputs([texts[n] for n in batch.texts], tokenizer.special, batch.length)
        of_document[batch.texts], of_memory[batch.texts] = jax.device_get(means(loaded.params, inputs))
    return Means([d.id for d in taken], of_document, of_memory, sum(len(p) > 1 for p in passages))


def project(means: Means, method: Method, seed: int = 0) -> Plane:
    """All means in one plane, by PCA or t-SNE of both kinds together. `seed` is t-SNE's.

    Raises `UserError` where scikit-learn is needed and not installed.
    """
    points = np.concatenate([means.document, means.memory])
    count = len(means.ids)
    if method == "pca":
        centred = points - points.mean(axis=0)
        _, scales, axes = np.linalg.svd(centred, full_matrices=False)
        flat = centred @ axes[:2].T
        shares = np.square(scales) / max(float(np.square(scales).sum()), 1e-30)
        return Plane(flat[:count], flat[count:], (float(shares[0]), float(shares[1])))
    require_package("sklearn", "--method tsne", "clara_jax[evaluate]")
    from sklearn.manifold import TSNE

    # t-SNE needs more points than its perplexity; 30 is its usual value.
    flat = TSNE(perplexity=min(30.0, (2 * count - 1) / 3), random_state=seed).fit_transform(points)
    return Plane(flat[:count], flat[count:], None)


def draw(plane: Plane, title: str, path: Path) -> None:
    """The plane as a PNG file: two colours, a thin line between the two means of a document. Raises `OSError`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6.5), layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    axes.add_collection(
        LineCollection(list(np.stack([plane.document, plane.memory], axis=1)), colors="0.75", linewidths=0.4)
    )
    axes.scatter(
        plane.document[:, 0], plane.document[:, 1], s=14, color="tab:blue", label="mean document state", zorder=2
    )
    axes.scatter(plane.memory[:, 0], plane.memory[:, 1], s=14, color="tab:orange", label="mean memory state", zorder=3)
    labels = [f"component {n} ({share:.1%} of the variance)" for n, share in enumerate(plane.explained or (), 1)]
    x, y = labels or ("", "")
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.legend()
    canvas.print_figure(path, dpi=150, format="png")


def write_coordinates(means: Means, plane: Plane, path: Path) -> None:
    """A CSV file of a row per document: its id and both points. Raises `OSError`."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "document_x", "document_y", "memory_x", "memory_y"])
        for name, document, memory in zip(means.ids, plane.document, plane.memory, strict=True):
            writer.writerow([name, *document.tolist(), *memory.tolist()])


@functools.lru_cache(maxsize=8)
def _means(model: RoleModel) -> Callable[[Params, EncoderInputs], tuple[Array, Array]]:
    def means(params: Params, inputs: EncoderInputs) -> tuple[Array, Array]:
        outputs = model.read(params, "compressor", inputs)
        return outputs.document_mean, outputs.memory_mean

    return jax.jit(means)
