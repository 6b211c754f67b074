"""Tiny tokenizer folders in the styles real models use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>' + '\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
MERGE_SYSTEM = (
    "{%- set turns = messages %}{%- set lead = '' %}{%- if messages[0]['role'] == 'system' %}"
    "{%- set lead = messages[0]['content'] + '\\n\\n' %}{%- set turns = messages[1:] %}{%- endif %}"
    "{{- bos_token }}{%- for turn in turns %}{%- if turn['role'] == 'user' %}"
    "{{- '[INST] ' + (lead if loop.first else '') + turn['content'] + ' [/INST]' }}"
    "{%- else %}{{- ' ' + turn['content'] + eos_token }}{%- endif %}{%- endfor %}"
)
REJECT_SYSTEM = (
    "{{ bos_token }}{% for turn in messages %}{% if turn['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% elif turn['role'] == 'user' %}"
    "{{ '[INST] ' + turn['content'] + ' [/INST]' }}{% else %}{{ ' ' + turn['content'] + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
PHI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
_WORDS = r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(lines: list[str], size: int, special: list[str]) -> Tokenizer:
    """Byte-level BPE; special tokens come after the ``size`` ordinary ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tokenizer


def sentencepiece_like(lines: list[str], size: int, legacy: bool) -> Tokenizer:
    """BPE on marked spaces with byte fallback, ``<unk> <s> </s>`` and bytes first."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=size - 259, show_progress=False)
    trained.train_from_iterator(lines, trainer)
    model = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    names += sorted(model["vocab"], key=model["vocab"].get)
    vocab = {name: i for i, name in enumerate(names)}
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    bpe = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in names[:3]])
    return tokenizer


def save_folder(
    tokenizer: Tokenizer,
    folder: Path,
    template: str,
    names: dict[str, Any],
    tokenizer_class: str,
    template_inside: bool,
) -> None:
    """The files transformers 4 writes; older versions keep the template in the config."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"added_tokens_decoder": {}}
    for entry in json.loads(tokenizer.to_str())["added_tokens"]:
        config["added_tokens_decoder"][str(entry.pop("id"))] = entry
    config |= names
    config |= {
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "padding_side": "right",
        "tokenizer_class": tokenizer_class,
    }
    if tokenizer_class == "LlamaTokenizer":
        config |= {"add_bos_token": True, "add_eos_token": False, "legacy": False}
    if template_inside:
        config["chat_template"] = template
    else:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", names)


def save_folder_v5(tokenizer: Tokenizer, folder: Path, template: str, names: dict[str, Any]) -> None:
    """The files the installed transformers 5 writes."""
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)
    fast.chat_template = template
    fast.save_pretrained(folder)


def write_json(path: Path, content: Any) -> None:
    """Indented, readable json."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
