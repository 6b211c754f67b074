"""`python -m experiments.pods --json FILE`: the table of docs/pods.md; needs the extra `tpu-preflight`.

Compiles the training step of every stage for every pod, one process each, and prints a Markdown table. What FILE holds
already is not compiled again, so that the command can be stopped and given again.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODELS = {"mistral_7b": "Mistral-7B", "phi_4_mini": "Phi-4-mini"}
STAGES = ("compression_pretraining", "instruction_tuning", "end_to_end")


@dataclasses.dataclass(frozen=True)
class Pod:
    """A pod: its topology, and how many devices share a copy of the base model there (`fsdp`)."""

    name: str
    topology: str
    slices: int
    devices: int
    fsdp: int

    def options(self, batch_size: int) -> list[str]:
        """Mesh and micro-batches for a batch of the paper's size, or of a record per device where that is more."""
        rows = max(batch_size, self.devices)
        parts = 4 if rows >= 4 * self.devices else 1
        mesh = [f"--mesh.data={self.devices // self.fsdp}", f"--mesh.fsdp={self.fsdp}"]
        return [*mesh, f"--batch_size={rows}", f"--micro_batches={parts}"]


PODS = (
    Pod("v5e-16", "v5e:4x4", 1, 16, 8),
    Pod("v5e-256", "v5e:16x16", 1, 256, 8),
    Pod("v5p-128", "v5p:4x4x8", 1, 128, 1),
    Pod("v6e-256", "v6e:16x16", 1, 256, 4),
    Pod("2 x v5e-256", "v5e:16x16", 2, 512, 8),
)


def main() -> None:
    """Compile what is missing, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m experiments.pods", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="File for the figures.")
    parser.add_argument("--model", choices=list(MODELS), nargs="+", default=list(MODELS))
    parser.add_argument("--stage", choices=STAGES, nargs="+", default=list(STAGES))
    parser.add_argument("--pod", choices=[pod.name for pod in PODS], nargs="+", default=[pod.name for pod in PODS])
    asked = parser.parse_args()
    figures: dict[str, Any] = json.loads(asked.json.read_text()) if asked.json.exists() else {}
    for key, (model, stage, pod) in _keys().items():
        if key in figures or model not in asked.model or stage not in asked.stage or pod.name not in asked.pod:
            continue
        print(key, file=sys.stderr, flush=True)
        figures[key] = _estimate(model, stage, pod)
        asked.json.write_text(json.dumps(figures, indent=1))
    print(_table(figures))


def _keys() -> dict[str, tuple[str, str, Pod]]:
    """What each figure is called, in the order in which all are made and printed."""
    return {f"{m} {s} {pod.name}": (m, s, pod) for pod in PODS for m in MODELS for s in STAGES}


def _estimate(model: str, stage: str, pod: Pod) -> dict[str, Any]:
    config = f"configs/{model}/{stage}.yaml"
    batch_size = 32 if stage == "end_to_end" else 128
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "clara_jax.preflight", "--config", config, "--topology", pod.topology]
        command += [f"--slices={pod.slices}", f"--json={out}", *pod.options(batch_size)]
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
        if not out.exists():
            raise SystemExit(f"{' '.join(command)} failed")
        return json.loads(out.read_text()) | {"batch_size": max(batch_size, pod.devices)}


def _table(figures: dict[str, Any]) -> str:
    rows = [
        "| Model, stage | Pod | Choice | Records | GB a device | of it base | Largest gather | At least | Held by "
        "| Compiled in |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, (model, stage, pod) in _keys().items():
        if key not in figures:
            continue
        one = figures[key]
        memory = one["memory"]
        size = "does not fit" if memory is None else f"{sum(memory.values()) / 1e9:.1f} of {one['available'] / 1e9:.1f}"
        gather = "not known" if one["largest_gather"] is None else f"{one['largest_gather'] / 1e9:.2f} GB"
        choice = " ".join(option.removeprefix("--").replace("mesh.", "") for option in one["options"].split())
        rows.append(
            f"| {MODELS[model]} {stage} | {pod.name} | {choice} | {one['batch_size']} | {size} | "
            f"{one['base_bytes'] / 1e9:.1f} | {gather} | "
            f"{max(one['seconds'].values()):.2f} s | {one['bound']} | {one['compile_seconds']:.0f} s |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
