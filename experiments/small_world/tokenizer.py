"""The tiny base's tokenizer: one token a word of the small world, single letters for any other word.

The three instructions of `clara_jax.data.prompts` that open every prompt are a token each, which halves the
length of a prompt.
"""

import json
import re
import string
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from clara_jax.data import prompts

BOS, EOS, PAD, UNKNOWN = "<s>", "</s>", "<pad>", "<unk>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"
SPECIAL = (PAD, BOS, EOS, UNKNOWN, USER, ASSISTANT)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% else %}<|assistant|>{{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A tokenizer with one token for every word, number and mark of `texts` and of the prompts' wording."""
    wording = [prompts.question_list_prompt().user, prompts.answer_prompt("").user, *prompts.PARAPHRASE_INSTRUCTIONS]
    wording.append(prompts.question_list_answer(["?"], ["."]))
    words = {word for text in (*wording, *texts) for word in _words(text.replace("{docs}", " "))}
    letters = [*string.ascii_letters, *string.digits, *string.punctuation]
    pieces = [*SPECIAL, *letters, *("##" + letter for letter in letters)]
    pieces += sorted(words - set(pieces))
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN))
    # Blanks are dropped and lines are kept, so that decoding gives back a text as it was written.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n+"), "isolated"),
            pre_tokenizers.Split(Regex("[ \t\r]+"), "removed"),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=True),
            decoders.Fuse(),
            decoders.Replace(" \n", "\n"),
            decoders.Replace("\n ", "\n"),
            decoders.Replace(" :", ":"),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    systems = (prompts.ANSWER_SYSTEM, prompts.QUESTION_LIST_SYSTEM, prompts.PARAPHRASE_SYSTEM)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in systems])
    return tokenizer


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write the files that transformers reads: tokenizer.json, tokenizer_config.json, chat_template.jinja."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE + "\n", encoding="utf-8")


def _words(text: str) -> list[str]:
    return re.findall(r"\n+|[^\W_]+|[^\w\s]", text)
