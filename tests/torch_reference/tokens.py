"""Tokenizer loading, special tokens and their ids.

``tokenizer.json`` is used exactly as it stands.  ``AutoTokenizer`` of
transformers 5 is avoided on purpose: for Llama folders it rebuilds the
normaliser and pre-tokenizer from ``tokenizer_config.json`` and then yields
other ids than the file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _content(token: Any) -> str | None:
    """Token entries are plain strings or dictionaries with a ``content``."""
    if isinstance(token, dict):
        return token.get("content")
    return token


@dataclass(frozen=True)
class SpecialIds:
    """Everything later code asks about special tokens."""

    mem_tokens: list[str]
    mem: list[int]
    ae: int
    enc: int
    sep: int
    bos_token: str
    bos: int
    eos_token: str
    eos: int
    pad_token: str
    pad: int
    length: int


class ClaraTokenizer:
    """A tokenizer folder prepared for ``n_mem`` memory tokens.

    ``model_name`` is the name the model was given (not where it was found):
    whether it contains "qwen" decides how a missing bos or eos is filled in.
    """

    def __init__(self, folder: Path, model_name: str, n_mem: int) -> None:
        config = _read_json(folder / "tokenizer_config.json")
        mapped = _read_json(folder / "special_tokens_map.json")
        raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
        raw.no_padding()
        raw.no_truncation()

        def named(key: str) -> str | None:
            return _content(mapped.get(key)) or _content(config.get(key))

        extra = mapped.get("additional_special_tokens") or config.get("additional_special_tokens")
        if not extra and isinstance(config.get("extra_special_tokens"), list):
            extra = config["extra_special_tokens"]
        extra = [_content(token) for token in extra or []]

        mem_tokens = [f"<MEM{i}>" for i in range(n_mem)]
        added = extra + mem_tokens + ["<AE>", "<ENC>", "<SEP>"]
        raw.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in added])

        bos, eos, pad = named("bos_token"), named("eos_token"), named("pad_token")
        if "qwen" in model_name.lower():
            bos = bos or extra[0]
            eos = eos or extra[1]
        pad = pad or bos
        assert bos and eos and pad

        template = folder / "chat_template.jinja"
        self.template = template.read_text(encoding="utf-8") if template.is_file() else config["chat_template"]
        self.raw = raw
        self._renderer = PreTrainedTokenizerFast(
            tokenizer_object=raw,
            bos_token=bos,
            eos_token=eos,
            pad_token=pad,
            unk_token=named("unk_token"),
            clean_up_tokenization_spaces=False,
        )
        number = raw.token_to_id
        self.ids = SpecialIds(
            mem_tokens=mem_tokens,
            mem=[number(t) for t in mem_tokens],
            ae=number("<AE>"),
            enc=number("<ENC>"),
            sep=number("<SEP>"),
            bos_token=bos,
            bos=number(bos),
            eos_token=eos,
            eos=number(eos),
            pad_token=pad,
            pad=number(pad),
            length=raw.get_vocab_size(with_added_tokens=True),
        )

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """Ids without automatic special tokens, cut on the right."""
        return self.raw.encode(text, add_special_tokens=False).ids[:max_length]

    def decode(self, ids: list[int], skip_special: bool) -> str:
        """Text of ``ids``."""
        return self.raw.decode(ids, skip_special_tokens=skip_special)

    def render(self, messages: list[dict[str, str]], generation_prompt: bool) -> str:
        """Text of ``messages`` through the chat template."""
        return self._renderer.apply_chat_template(
            messages,
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            enable_thinking=False,
        )

    def describe(self) -> dict[str, Any]:
        """The ``tokens`` part of ``tokens.json``."""
        ids = self.ids
        return {
            "vocab_after_resize": ids.length,
            "tokenizer_len": ids.length,
            "mem_tokens": ids.mem_tokens,
            "mem_token_ids": ids.mem,
            "ae_token_id": ids.ae,
            "enc_token_id": ids.enc,
            "sep_token_id": ids.sep,
            "bos_token": ids.bos_token,
            "bos_token_id": ids.bos,
            "eos_token": ids.eos_token,
            "eos_token_id": ids.eos,
            "pad_token": ids.pad_token,
            "pad_token_id": ids.pad,
            "padding_side": "left",
            "truncation_side": "right",
        }
