"""CLaRa in JAX: compress documents to memory tokens, retrieve by similarity, answer from memories."""

import os
import time

STARTED = time.perf_counter()  # when a command began, but for the interpreter's own start

# transformers serves tokenizers here; that PyTorch is not installed is no news to anyone.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from clara_jax.clara import Clara, Generation  # noqa: E402
from clara_jax.errors import UserError  # noqa: E402

__all__ = ["Clara", "Generation", "UserError"]
