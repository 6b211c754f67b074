"""`python -m experiments.accelerator --json FILE`: what is to be measured on one large GPU, in ten minutes.

Mistral-7B's shape, bfloat16, random weights: the step of each stage, compression and decoding (`clara_jax.benchmark`),
a step beside PyTorch + PEFT (`experiments.step_time`), and one step in bfloat16 beside float32 on the CPU. Each is a
process of its own with a share of the time; one that fails or takes too long is told, and the others go on. Needs the
extras `cuda` and `convert`, and peft.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_ONE = ["--mesh.data=1", "--mesh.fsdp=1", "--timed=6", "--warmup=2", "--model.remat=lora", "--model.attention=cudnn"]
_BENCHMARK = [sys.executable, "-m", "clara_jax.benchmark"]
_CONFIGS = "--config=configs/mistral_7b"
_SHAPE = ["--hidden=4096", "--layers=32", "--heads=32", "--kv-heads=8", "--mlp=14336", "--dtype=bfloat16"]
_BESIDE = ["--device=cuda", "--attention=cudnn", "--no-ablations", "--no-agreement"]
# Name, command, and most seconds.
WORK: tuple[tuple[str, list[str], int], ...] = (
    (
        "stage 1",
        [*_BENCHMARK, f"{_CONFIGS}/compression_pretraining.yaml", "--batch_size=32", "--micro_batches=1", *_ONE],
        90,
    ),
    ("stage 2", [*_BENCHMARK, f"{_CONFIGS}/instruction_tuning.yaml", "--batch_size=8", "--micro_batches=1", *_ONE], 80),
    ("stage 3", [*_BENCHMARK, f"{_CONFIGS}/end_to_end.yaml", "--batch_size=32", *_ONE], 80),
    ("compress", [*_BENCHMARK, f"{_CONFIGS}/end_to_end.yaml", "--task=compress", *_ONE], 50),
    ("decode", [*_BENCHMARK, f"{_CONFIGS}/end_to_end.yaml", "--task=decode", *_ONE], 60),
    (
        "beside PyTorch",
        [sys.executable, "-m", "experiments.step_time", "--questions=2", "--documents=8", *_BESIDE, *_SHAPE],
        180,
    ),
    ("bfloat16 beside float32", [sys.executable, "-m", "experiments.accelerator.parity"], 60),
)


def main() -> None:
    """Run all, print what each says, and write the figures."""
    parser = argparse.ArgumentParser(prog="python -m experiments.accelerator", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="File for the figures.")
    parser.add_argument("--only", nargs="+", choices=[name for name, _, _ in WORK], help="Only these.")
    asked = parser.parse_args()
    figures = {}
    for name, command, limit in WORK:
        if asked.only is None or name in asked.only:
            print(f"\n## {name}\n", flush=True)
            figures[name] = run(command, limit)
            asked.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


def run(command: list[str], limit: int) -> dict[str, Any]:
    """The figures that a command writes, and how it ended: its status, and its seconds."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        writes = [] if command[-1].endswith("parity") else [f"--json={out}"]
        environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
        if Path("/dev/shm").is_dir():  # the weights that both sides read: 15 GB
            environment["TMPDIR"] = "/dev/shm"
        try:
            status: int | str = subprocess.run(
                [*command, *writes], cwd=ROOT, env=environment, timeout=limit, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            status = f"took longer than {limit} s"
        figures = json.loads(out.read_text(encoding="utf-8")) if out.exists() else None
    print(f"\nstatus {status}", flush=True)
    return {"status": status, "seconds": time.monotonic() - start, "figures": figures}


if __name__ == "__main__":
    main()
