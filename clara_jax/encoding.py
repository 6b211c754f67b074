"""Many texts to memories: batched by length, divided over all devices of a mesh.

Texts are taken in order of length, so that a batch pads little, as many at a time as make a batch of about
`batch_tokens` columns. Lengths are multiples of 32 and the rows of a length are fixed, so few programs are compiled.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from clara_jax.data.collate import pad_encoder_inputs
from clara_jax.data.tokenizer import LAYOUT_TOKENS
from clara_jax.interop.base import base_fingerprint
from clara_jax.models.roles import EncoderInputs, Params, Role, RoleModel
from clara_jax.pretrained import Pretrained, special_rows
from clara_jax.sharding import DATA, FSDP, fetch, local_rows, on_mesh, place_batch, replicated

LENGTHS = 32  # a batch's length is a multiple of it


@dataclasses.dataclass(frozen=True)
class TextBatch:
    """Which texts are read together, and the [rows, length] array that they are padded to."""

    texts: Int[np.ndarray, " texts"]
    rows: int
    length: int


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Memories in the order of the texts, and how many of the columns that were computed were `padding`."""

    memories: Float[np.ndarray, "texts memory hidden"]
    columns: int
    padding: int


class Encoder:
    """Reads texts by one model, on one mesh or (without one) where its parameters are."""

    def __init__(self, loaded: Pretrained, params: Params, mesh: Mesh | None = None, batch_tokens: int | None = None):
        """`params` are the loaded model's, or another set of the same model (with a query reasoner).

        `batch_tokens` are the columns of a batch for each of the devices that divide it; by default 1,024 on the CPU,
        where larger batches pad more and gain nothing, and 8,192 on an accelerator.
        """
        self._loaded, self._params, self._mesh = loaded, params, mesh
        self._multiple = 1 if mesh is None else mesh.shape[DATA] * mesh.shape[FSDP]
        default = 1024 if jax.default_backend() == "cpu" else 8192
        self._batch_tokens = (batch_tokens or default) * self._multiple
        self._encode = _encoding(loaded.model, mesh)

    def __call__(
        self, role: Role, texts: Sequence[list[int]], progress: Callable[[int], None] = lambda texts: None
    ) -> Encoded:
        """Encode token lists (of `ClaraTokenizer.encode_passages`) by the adapter of `role`.

        `progress` is told how many texts are done, batch by batch.
        """
        special, config = self._loaded.tokenizer.special, self._loaded.model.decoder.config
        memories = np.empty(
            (len(texts), special.num_memory, config.hidden_size), np.dtype(self._loaded.model.decoder.dtype)
        )
        sizes = np.array([len(text) for text in texts], int) + special.num_memory
        longest = self._loaded.checkpoint.doc_max_length + LAYOUT_TOKENS + special.num_memory
        columns = 0

        def receive(batch: TextBatch, computed: Array) -> None:
            memories[batch.texts] = np.asarray(computed)[: len(batch.texts)]
            progress(len(batch.texts))

        waiting: tuple[TextBatch, Array] | None = None  # one batch is computed while the one before is fetched
        for batch in text_batches(sizes, self._batch_tokens, longest, self._multiple):
            rows = [texts[i] for i in batch.texts] + [texts[batch.texts[0]]] * (batch.rows - len(batch.texts))
            if self._mesh is not None:
                rows = [rows[i] for i in local_rows(self._mesh, batch.rows)]
            inputs = pad_encoder_inputs(rows, special, batch.length)
            if self._mesh is not None:
                inputs = place_batch(self._mesh, inputs, batch.rows)
            computed = self._encode(self._params, role, inputs)
            if waiting is not None:
                receive(*waiting)
            waiting = batch, computed
            columns += batch.rows * batch.length
        if waiting is not None:
            receive(*waiting)
        return Encoded(memories, columns, columns - int(sizes.sum()))


def text_batches(
    sizes: Int[np.ndarray, " texts"], batch_tokens: int, longest: int, multiple: int = 1
) -> Iterator[TextBatch]:
    """Texts of `sizes` columns in batches of about `batch_tokens`, the longest first.

    No batch is padded beyond `longest`, the most that texts have as a rule. The rows of a batch are a multiple of
    `multiple`; the last batch has as few as a power of two allows.
    """
    order = np.argsort(-sizes, kind="stable")
    start = 0
    while start < len(order):
        size = int(sizes[order[start]])
        length = max(size, min(longest, -(-size // LENGTHS) * LENGTHS))
        most = max(1, batch_tokens // (length * multiple)) * multiple
        texts = order[start : start + most]
        fewest = multiple * (1 << max(0, -(-len(texts) // multiple) - 1).bit_length())
        yield TextBatch(texts, min(most, fewest), length)
        start += most


def fingerprint(loaded: Pretrained) -> str:
    """Identifies what makes memories: the base, the compressor, the memory tokens and the layout's tokens.

    The other two adapters play no part: a store stays good when they are trained further. Parameters are compared as
    bfloat16, so that the compute type plays none either.
    """
    params, decoder = loaded.params, loaded.model.decoder
    digest = hashlib.sha256(base_fingerprint(loaded.base_folder).encode())
    digest.update(f"{decoder.lora_alpha} {loaded.checkpoint.num_memory}".encode())
    embed = special_rows(params, loaded.tokenizer.special)["embed"][loaded.tokenizer.special.num_memory :]
    parts = {"compressor": params["compressor"], "memory_tokens": params["memory_tokens"], "layout": embed}
    for path, leaf in jax.tree_util.tree_leaves_with_path(parts):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(fetch(leaf.astype(jnp.bfloat16)).tobytes())
    return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=8)
def _encoding(model: RoleModel, mesh: Mesh | None) -> Callable[[Params, Role, EncoderInputs], Array]:
    def encode(params: Params, role: Role, inputs: EncoderInputs) -> Array:
        return model.encode(params, role, inputs)[0]

    if mesh is None:
        return jax.jit(encode, static_argnums=1)
    return jax.jit(on_mesh(mesh, encode), static_argnums=1, out_shardings=replicated(mesh))
