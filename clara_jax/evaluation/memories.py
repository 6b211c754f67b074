"""Memories of documents by id; each document is compressed once, when it is first needed."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from clara_jax.clara import Clara
from clara_jax.scoring.candidates import Candidate

_AT_ONCE = 1024  # documents in one call: they are sorted by length within it


class Memories:
    """The memories of a pool's documents. `cut` counts compressed documents that were longer than the limit."""

    def __init__(self, clara: Clara, documents: Mapping[str, Candidate]):
        self._clara, self._documents = clara, documents
        self._known: dict[str, np.ndarray] = {}
        self.cut = 0

    def __len__(self) -> int:
        """How many documents have been compressed."""
        return len(self._known)

    def of(self, keys: Sequence[str]) -> Float[np.ndarray, "documents memory hidden"]:
        """The memories of the documents with these ids, of which there must be one."""
        missing = [key for key in dict.fromkeys(keys) if key not in self._known]
        for start in range(0, len(missing), _AT_ONCE):
            some = missing[start : start + _AT_ONCE]
            texts = [self._documents[key].content for key in some]
            limit = self._clara.doc_max_length
            self.cut += sum(cut for _, cut in self._clara.tokenizer.encode_passages(texts, limit))
            self._known.update(zip(some, np.asarray(self._clara.compress(texts)), strict=True))
        return np.stack([self._known[key] for key in keys])
