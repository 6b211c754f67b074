"""CLaRa in JAX: compress documents to memory tokens, retrieve by similarity, answer from memories."""

from clara_jax.clara import Clara, Generation
from clara_jax.errors import UserError

__all__ = ["Clara", "Generation", "UserError"]
