"""Token arrays for the encoder and the generator (left padded)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .prompts import Prompt
from .tokens import ClaraTokenizer


@dataclass(frozen=True)
class Batch:
    """Left padded ids and mask, with labels for generator inputs."""

    ids: Tensor
    mask: Tensor
    labels: Tensor | None = None


def left_pad(rows: list[list[int]], pad: int, width: int) -> tuple[Tensor, Tensor]:
    """Rows moved to the right edge of a [rows, width] table, and their mask."""
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        if row:
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
    return ids, mask


def encoder_batch(tokenizer: ClaraTokenizer, texts: list[str], max_length: int, query: str | None = None) -> Batch:
    """``<ENC>`` bos text eos, padded to a fixed width, then the memory tokens."""
    special = tokenizer.ids
    lead, room = "", 3
    if query is not None:
        lead, room = f"\nQuery:\n{query}Document:\n", 8
    width = max_length + room
    rows = [tokenizer.encode("<ENC>" + special.bos_token + lead + text + special.eos_token, width) for text in texts]
    ids, mask = left_pad(rows, special.pad, width)
    memory = torch.tensor(special.mem).expand(len(texts), -1)
    return Batch(torch.cat([ids, memory], 1), torch.cat([mask, torch.ones_like(memory)], 1))


def generator_batch(tokenizer: ClaraTokenizer, prompts: list[Prompt], max_length: int) -> Batch:
    """Training input: prompt and answer, loss only on the answer."""
    texts = [prompt.full for prompt in prompts]
    lengths = [len(tokenizer.encode(prompt.prompt)) for prompt in prompts]
    return labelled_batch(tokenizer, texts, lengths, max_length)


def labelled_batch(tokenizer: ClaraTokenizer, texts: list[str], prompt_lengths: list[int], max_length: int) -> Batch:
    """Tokenised ``texts`` whose first ``prompt_lengths`` tokens carry no loss."""
    rows = [tokenizer.encode(text, max_length) for text in texts]
    ids, mask = left_pad(rows, tokenizer.ids.pad, max(map(len, rows)))
    labels = ids.clone()
    for i, (row, length) in enumerate(zip(rows, prompt_lengths)):
        labels[i, : ids.shape[1] - len(row) + length] = -100
    return Batch(ids, mask, labels)


def prompt_batch(tokenizer: ClaraTokenizer, prompts: list[Prompt], max_length: int = 1024) -> Batch:
    """Generation input: prompts only."""
    rows = [tokenizer.encode(prompt.prompt, max_length) for prompt in prompts]
    ids, mask = left_pad(rows, tokenizer.ids.pad, max(map(len, rows)))
    return Batch(ids, mask)
