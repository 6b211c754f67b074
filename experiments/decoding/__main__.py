"""`python -m experiments.decoding`: greedy decoding beside Hugging Face `generate`, same weights and prompts, in turn.

A Mistral-shaped model of random weights (hidden 512, 8 layers, 8 heads of which 4 are for keys and values, 32,000
entries, float32) with a generator adapter of rank 16 on every linear layer. The other side is transformers with
PEFT, its adapter active beside the weights as here. Both continue prompts of mixed length by `--new` tokens and must
write the same ones. Printed are medians over alternating repeats, prefill (one new token) taken off for the decoding.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from peft import PeftModel

from clara_jax.generation import decoding_weights, generate
from clara_jax.interop.adapters import write_peft
from clara_jax.interop.base import load_base
from clara_jax.models.config import read_decoder_config
from clara_jax.models.decoder import Decoder
from clara_jax.models.lora import LoraConfig, init_adapter
from clara_jax.models.roles import GeneratorInputs, RoleModel

VOCABULARY = 32000
LORA = LoraConfig(16, 32.0, 0.0)


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=128, help="longest prompt in tokens")
    parser.add_argument("--new", type=int, default=128, help="new tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = _models(Path(folder), options.hidden, options.layers)
    figures = []
    print("| batch | | tokens/s | prefill ms | decode ms/token |\n|---|---|---|---|---|")
    for batch in (1, 8):
        tokens, valid = _prompts(batch, options.prompt)
        sides = {"clara_jax": ours(tokens, valid), "transformers + PEFT": theirs(tokens, valid)}
        written = [run(options.new) for run in sides.values()]
        if not np.array_equal(*written):
            raise SystemExit(f"batch {batch}: the two sides have written different tokens")
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for repeat in range(2 * options.repeats):
            name = list(sides)[repeat % 4 in (1, 2)]
            taken[name].append((_timed(sides[name], 1), _timed(sides[name], options.new)))
        for name, times in taken.items():
            prefill, whole = (statistics.median(column) for column in zip(*times, strict=True))
            figure = {
                "batch": batch,
                "side": name,
                "tokens_per_second": batch * options.new / whole,
                "prefill_ms": 1e3 * prefill,
                "decode_ms": 1e3 * (whole - prefill) / (options.new - 1),
            }
            figures.append(figure)
            print(f"| {batch} | {name} | {figure['tokens_per_second']:.0f} | {figure['prefill_ms']:.0f} ", end="")
            print(f"| {figure['decode_ms']:.2f} |", flush=True)
        mine, other = figures[-2:]
        ratios = [b[1] / a[1] for a, b in zip(*taken.values(), strict=True)]
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        print(
            f"batch {batch}: {mine['tokens_per_second'] / other['tokens_per_second']:.2f} times the tokens/s ", end=""
        )
        print(f"(per repeat {middle:.2f}, quartiles {low:.2f} and {high:.2f})\n", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"settings": vars(options) | {"json": None}, "figures": figures}, indent=1))


def _timed(run: Callable[[int], Any], new: int) -> float:
    start = time.perf_counter()
    run(new)
    return time.perf_counter() - start


def _prompts(batch: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and their mask, padded on the left; lengths from half the longest on."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(10, VOCABULARY - 20, (batch, longest)).astype(np.int32)
    lengths = np.linspace(longest, longest // 2, batch).astype(int)
    return tokens, np.arange(longest)[None] >= (longest - lengths)[:, None]


def _models(folder: Path, hidden: int, layers: int) -> tuple[Any, Any]:
    """Two functions of prompts, each giving a function that continues them by so many tokens."""
    config = transformers.MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        sliding_window=None,
        initializer_range=0.05,
    )
    torch.manual_seed(0)
    transformers.MistralForCausalLM(config).save_pretrained(folder / "base")
    decoder_config = read_decoder_config(folder / "base")
    model = RoleModel(Decoder(decoder_config, dtype=jnp.float32, lora_alpha=LORA.alpha), VOCABULARY - 4)
    base = load_base(folder / "base", decoder_config, jnp.dtype("float32"), VOCABULARY)
    adapter = init_adapter(jax.random.key(0), decoder_config, LORA.rank)
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    adapter = tree.unflatten([0.02 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])
    params = {"base": base, "generator": adapter, "memory_tokens": base["embed"][VOCABULARY - 4 :]}
    write_peft(folder / "adapter", adapter, decoder_config, LORA, str(folder / "base"))
    other = transformers.MistralForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    other = PeftModel.from_pretrained(other, folder / "adapter").eval()
    other.generation_config.eos_token_id = other.generation_config.bos_token_id = None

    weights = decoding_weights(model, params)

    def ours(tokens: np.ndarray, valid: np.ndarray) -> Callable[[int], np.ndarray]:
        batch = len(tokens)
        none = np.zeros((batch, 0, 4), np.int32)
        targets = np.zeros((batch, 1), np.int32)
        inputs = GeneratorInputs(tokens, valid, none, targets, targets, targets.astype(np.float32))
        memories = np.zeros((batch, 0, 4, hidden), np.float32)

        def run(new: int) -> np.ndarray:
            written = generate(
                model,
                params,
                inputs,
                memories,
                max_new_tokens=128,
                stop_ids=(-1,),
                pad_id=0,
                limit=new,
                weights=weights,
            )
            return np.asarray(written)[:, :new]

        return run

    def theirs(tokens: np.ndarray, valid: np.ndarray) -> Callable[[int], np.ndarray]:
        ids, mask = torch.from_numpy(tokens).long(), torch.from_numpy(valid).long()

        def run(new: int) -> np.ndarray:
            with torch.inference_mode():
                written = other.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0
                )
            return written[:, ids.shape[1] :].numpy()

        return run

    return ours, theirs


if __name__ == "__main__":
    main()
