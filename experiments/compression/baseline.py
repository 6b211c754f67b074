"""Compression as PyTorch users write it: transformers, PEFT's adapter active, padding on the left."""

from typing import Any

import numpy as np
import torch

from clara_jax.data.tokenizer import SpecialTokens
from clara_jax.encoding import Encoded


def compress(model: Any, texts: list[list[int]], special: SpecialTokens, batch: int, pad_to: int | None) -> Encoded:
    """Memories of `texts`, `batch` at a time.

    Every text is padded to `pad_to` tokens, memory tokens apart, as the reference does it; where that is None, texts
    are sorted by length and padded to the longest of their batch. The output head is left out, unlike in the reference:
    that saves the baseline work that nobody needs.
    """
    decoder = model.get_base_model().model  # the adapter is within its linear layers
    order = np.arange(len(texts))
    if pad_to is None:
        order = np.argsort([-len(text) for text in texts], kind="stable")
    memories: np.ndarray | None = None
    columns = 0
    for start in range(0, len(texts), batch):
        rows = order[start : start + batch]
        width = pad_to or max(len(texts[i]) for i in rows)
        ids = torch.full((len(rows), width + special.num_memory), special.pad)
        mask = torch.zeros_like(ids)
        ids[:, width:] = torch.tensor(special.memory_ids)
        mask[:, width:] = 1
        for row, i in enumerate(rows):
            first = width - len(texts[i])
            ids[row, first:width] = torch.tensor(texts[i])
            mask[row, first:] = 1
        with torch.inference_mode():
            hidden = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        if memories is None:
            memories = np.empty((len(texts), special.num_memory, hidden.shape[-1]), np.float32)
        memories[rows] = hidden[:, width:].numpy()
        columns += ids.numel()
    assert memories is not None
    real = sum(len(text) + special.num_memory for text in texts)
    return Encoded(memories, columns, columns - real)
