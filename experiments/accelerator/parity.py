"""`python -m experiments.accelerator.parity`: a step of stages 1 and 3 in bfloat16 here beside float32 on the CPU.

The same random weights and batch, a model of a few layers. Loss and norm of the gradient may differ by the rounding of
bfloat16 (8 bits): a few parts in a thousand. The exit status is 1 where they differ by more than 2 %.
"""

import dataclasses
import sys
from collections.abc import Sequence

import jax

from clara_jax.config import TrainConfig, parse_train_config
from clara_jax.models.config import DecoderConfig
from clara_jax.planning.known_models import shape_of
from clara_jax.planning.random_inputs import random_arguments
from clara_jax.planning.workload import Sizes, make_workload
from clara_jax.sharding import MeshConfig, make_mesh

_STAGES = ("compression_pretraining", "end_to_end")
_MOST = 0.02


def main() -> None:
    """Compare, and print a table."""
    shape = dataclasses.replace(
        shape_of("mistralai/Mistral-7B-Instruct-v0.2"),
        num_layers=2,
        hidden_size=512,
        intermediate_size=1408,
        num_heads=8,
        num_kv_heads=2,
        vocab_size=4096,
    )
    sizes = Sizes(candidates=4, prompt=160, targets=32)
    worst = 0.0
    print("| Stage | | float32, CPU | bfloat16, here | relative difference |")
    print("|---|---|---|---|---|")
    for stage in _STAGES:
        config = _config(stage)
        expected = _step(config, "float32", jax.devices("cpu")[:1], shape, sizes)
        found = _step(config, "bfloat16", jax.devices()[:1], shape, sizes)
        for name, value in expected.items():
            difference = abs(found[name] - value) / abs(value)
            worst = max(worst, difference)
            print(f"| {stage} | {name} | {value:.5f} | {found[name]:.5f} | {difference:.1e} |")
    sys.exit(0 if worst <= _MOST else 1)


def _config(stage: str) -> TrainConfig:
    settings = {"run_dir": "none", "stage": stage, "model.base": "none", "data.path": "[none]", "lora.dropout": 0}
    settings |= {"batch_size": 4, "objective.top_k": 2, "objective.temperature": 0.5}
    return parse_train_config([f"--{key}={value}" for key, value in settings.items()])


def _step(
    config: TrainConfig, dtype: str, devices: Sequence[jax.Device], shape: DecoderConfig, sizes: Sizes
) -> dict[str, float]:
    """Loss and norm of the gradient of one step."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    workload = make_workload(config, shape, make_mesh(MeshConfig(1, 1, 1), devices), sizes)
    _, metrics = workload.function(*random_arguments(workload))
    return {name: float(metrics[name]) for name in ("loss", "gradient_norm")}


if __name__ == "__main__":
    main()
