"""One random compressor on two sides: as this project's `Pretrained`, and as transformers with a PEFT adapter."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import torch
import transformers
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from clara_jax.interop.adapters import write_peft
from clara_jax.models.lora import LoraConfig
from clara_jax.pretrained import Pretrained, new_model

DOC_MAX_LENGTH, RATE = 256, 32
LORA = LoraConfig(rank=16, alpha=32.0, dropout=0.0)
_VOCABULARY = 16384
_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclasses.dataclass(frozen=True)
class Shape:
    """Size of the base model."""

    hidden: int = 512
    layers: int = 8
    heads: int = 8
    kv_heads: int = 4
    mlp: int = 1408


def make_models(folder: Path, texts: list[str], shape: Shape) -> tuple[Pretrained, Any]:
    """The same weights for both sides; the tokenizer is trained on `texts`, so that lengths are those of real ones."""
    base = folder / "base"
    train_tokenizer(texts, base)
    special = DOC_MAX_LENGTH // RATE + 3
    config = transformers.MistralConfig(
        vocab_size=len(transformers.PreTrainedTokenizerFast.from_pretrained(base)) + special,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        sliding_window=None,
        initializer_range=0.04,
    )
    torch.manual_seed(0)
    transformers.MistralForCausalLM(config).save_pretrained(base)
    ours = new_model(str(base), DOC_MAX_LENGTH, RATE, LORA, seed=0, dtype="float32")
    ours.params["compressor"] = _random_like(ours.params["compressor"])
    write_peft(folder / "adapter", ours.params["compressor"], ours.model.decoder.config, LORA, str(base))
    theirs = transformers.MistralForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        theirs.get_input_embeddings().weight[ours.tokenizer.special.memory_ids] = torch.tensor(
            jax.device_get(ours.params["memory_tokens"])
        )
    return ours, PeftModel.from_pretrained(theirs, folder / "adapter").eval()


def _random_like(adapter: Any) -> Any:
    """An adapter whose B is not zero, so that leaving it out would show."""
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([0.03 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)])


def train_tokenizer(texts: list[str], folder: Path) -> None:
    """Write a byte-level tokenizer of 16,384 entries, trained on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = _TEMPLATE
    fast.save_pretrained(folder)
