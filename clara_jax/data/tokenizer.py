"""The base model's tokenizer with CLaRa's special tokens, and the encoder's text layout.

`tokenizer.json` is taken as it stands: the per-family classes of transformers rebuild the normaliser of
some Llama folders and then give other ids than the model was trained with.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from clara_jax.checked_json import read_object
from clara_jax.errors import fail

# <ENC>, bos and eos around a passage's text.
LAYOUT_TOKENS = 3


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Ids that the model needs. Memory tokens are `first_memory ... first_memory + num_memory - 1`."""

    first_memory: int
    num_memory: int
    ae: int
    enc: int
    sep: int
    bos: int
    eos: int
    pad: int

    @property
    def memory_ids(self) -> list[int]:
        """Ids of `<MEM0>`, `<MEM1>`, ..."""
        return list(range(self.first_memory, self.first_memory + self.num_memory))


class ClaraTokenizer:
    """A fast tokenizer extended by `<MEM0>`..`<MEM{m-1}>`, `<AE>`, `<ENC>`, `<SEP>`, in that order."""

    def __init__(self, folder: Path, num_memory: int):
        """Load from a Hugging Face folder. Raises `UserError` if a file or a needed token is missing."""
        if num_memory < 1:
            fail(
                f"{num_memory} memory tokens per document",
                "Choose a compression rate no larger than the document length",
            )
        self.folder = folder
        self.backend = _load_backend(folder)
        self.backend.padding_side, self.backend.truncation_side = "left", "right"
        memory = [f"<MEM{i}>" for i in range(num_memory)]
        self.backend.add_tokens([*memory, "<AE>", "<ENC>", "<SEP>"], special_tokens=True)
        self.memory_text = "".join(memory) + "<SEP>"
        ids = [int(i) for i in self.backend.convert_tokens_to_ids([*memory, "<AE>", "<ENC>", "<SEP>"])]
        if ids[:num_memory] != list(range(ids[0], ids[0] + num_memory)):
            fail(
                f"{folder}: the memory tokens do not have consecutive ids ({ids[:num_memory]})",
                "Use the base model's own tokenizer",
            )
        bos, eos, pad = _sentence_tokens(folder, self.backend)
        self.bos, self.eos = bos, eos
        index = self.backend.convert_tokens_to_ids
        self.special = SpecialTokens(
            first_memory=ids[0],
            num_memory=num_memory,
            ae=ids[-3],
            enc=ids[-2],
            sep=ids[-1],
            bos=index(bos),
            eos=index(eos),
            pad=index(pad),
        )

    def __len__(self) -> int:
        """Size of the vocabulary, CLaRa's tokens included."""
        return len(self.backend)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special-token strings inside are parsed, none are added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each of `texts`, as `encode` gives them, computed on all cores."""
        return list(self.backend(texts, add_special_tokens=False, verbose=False)["input_ids"]) if texts else []

    def decode(self, ids: list[int]) -> str:
        """Text of `ids` without special tokens."""
        return str(self.backend.decode(ids, skip_special_tokens=True))

    def is_byte(self, token: int) -> bool:
        """Whether a token is a single byte of a character that the vocabulary lacks (SentencePiece's fallback)."""
        return bool(re.fullmatch(r"<0x[0-9A-F]{2}>", self.backend.convert_ids_to_tokens(token)))

    def encode_passage(self, text: str, max_length: int) -> tuple[list[int], bool]:
        """Encoder ids of a document or question, memory tokens not included, and whether it was cut.

        The layout is `<ENC>` bos text eos, cut on the right to `max_length + 3`; a text that is cut loses
        its eos, as in the reference.
        """
        return self.encode_passages([text], max_length)[0]

    def encode_passages(self, texts: list[str], max_length: int) -> list[tuple[list[int], bool]]:
        """`encode_passage` of each of `texts`, computed on all cores."""
        rows = self.encode_batch([f"<ENC>{self.bos}{text}{self.eos}" for text in texts])
        return [(ids[: max_length + LAYOUT_TOKENS], len(ids) > max_length + LAYOUT_TOKENS) for ids in rows]

    def chat(self, messages: list[dict[str, str]], *, generation_prompt: bool) -> str:
        """`messages` through the model's chat template, thinking off."""
        return str(
            self.backend.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                enable_thinking=False,
            )
        )


def _load_backend(folder: Path) -> Any:
    if not (folder / "tokenizer.json").exists():
        fail(
            f"{folder / 'tokenizer.json'} does not exist",
            "Save the tokenizer with tokenizer.save_pretrained of a recent transformers release",
        )
    try:
        backend = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception for a malformed file
        fail(f"{folder}: the tokenizer cannot be read ({error})", "Download the tokenizer files again")
    if not backend.chat_template:
        fail(
            f"{folder}: the tokenizer has no chat template",
            "Use an instruction-tuned model, or add chat_template.jinja to the folder",
        )
    return backend


def _sentence_tokens(folder: Path, backend: Any) -> tuple[str, str, str]:
    """bos, eos and pad. Qwen has no bos: its first additional special token stands in, as in the reference."""
    additional = _additional_special_tokens(folder)
    bos, eos = backend.bos_token, backend.eos_token
    if bos is None and additional:
        bos = additional[0]
    if eos is None and len(additional) > 1:
        eos = additional[1]
    if bos is None or eos is None:
        fail(
            f"{folder}: the tokenizer has no {'bos' if bos is None else 'eos'} token",
            "Name it in tokenizer_config.json",
        )
    return bos, eos, backend.pad_token or bos


def _additional_special_tokens(folder: Path) -> list[str]:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        fields = read_object(path, "Download the tokenizer files again") if path.exists() else {}
        # transformers 4 calls the list `additional_special_tokens`, transformers 5 `extra_special_tokens`.
        for key in ("additional_special_tokens", "extra_special_tokens"):
            tokens = fields.get(key)
            if isinstance(tokens, list) and tokens:
                return [token["content"] if isinstance(token, dict) else token for token in tokens]
    return []
