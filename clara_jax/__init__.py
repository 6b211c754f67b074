"""CLaRa in JAX: compress documents to memory tokens, retrieve by similarity, answer from memories."""

import os

# transformers serves tokenizers here; that PyTorch is not installed is no news to anyone.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from clara_jax.clara import Clara, Generation
from clara_jax.errors import UserError

__all__ = ["Clara", "Generation", "UserError"]
