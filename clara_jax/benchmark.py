"""`python -m clara_jax.benchmark --config FILE [--stage STAGE]`: step time of random weights on the devices here.

Nothing is downloaded: of the base model only its shape is used. The utilisation of the hardware is taken against the
fastest product that a device of this machine was seen to do in the same type, and against its maker's figure.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clara_jax.command_line import parse, say
from clara_jax.config import TrainConfig, train_config, train_parser
from clara_jax.errors import fail, run_command
from clara_jax.files import replace_text
from clara_jax.models.config import DecoderConfig
from clara_jax.planning.chips import FIGURES, chip_of
from clara_jax.planning.known_models import shape_of
from clara_jax.planning.timing import Timing, measured_peak, time_workload
from clara_jax.planning.workload import Sizes, Task, Workload, compute_dtype, make_workload
from clara_jax.sharding import make_mesh
from clara_jax.training.flops import batch_lengths, forward_flops, peak_flops, step_flops
from clara_jax.training.setup import use_compilation_cache


def main() -> None:
    """Parse, time, print."""
    parser = train_parser("python -m clara_jax.benchmark", (__doc__ or "").split(": ", 1)[1])
    parser.add_argument("--task", type=Task, default="train", help="Which program; train, compress or decode.")
    parser.add_argument("--layers", type=int, default=None, help="Layers of the base model (default: its own).")
    parser.add_argument("--timed", type=int, default=20, help="Executions that are timed.")
    parser.add_argument("--warmup", type=int, default=3, help="Executions before those.")
    parser.add_argument("--json", type=str, default=None, help="File for the figures.")
    parser.add_class_arguments(Sizes, "sizes")
    built = parse(parser)
    config = train_config(built)
    for name, least in (("layers", 1), ("timed", 1), ("warmup", 0)):
        if built[name] is not None and built[name] < least:
            fail(f"{name} is {built[name]}", f"Give at least {least}")
    shape = shape_of(config.model.base)
    if built.layers is not None:
        windows = shape.windows[: built.layers]
        shape = dataclasses.replace(shape, num_layers=built.layers, windows=windows)
    use_compilation_cache(config.compilation_cache)
    figures = benchmark(config, shape, built.sizes, built.task, built.timed, built.warmup)
    print(as_markdown(figures))
    if built.json is not None:
        replace_text(Path(built.json), json.dumps(figures, indent=1))


def benchmark(
    config: TrainConfig, shape: DecoderConfig, sizes: Sizes, task: Task, timed: int, warmup: int
) -> dict[str, Any]:
    """The figures of one workload on this machine's devices."""
    mesh = make_mesh(config.mesh)
    device = mesh.devices.flat[0]
    workload = make_workload(config, shape, mesh, sizes, task)
    dtype = compute_dtype(config, mesh)
    say(f"{task} of {config.stage} on {mesh.size} x {device.device_kind}: measuring the fastest {dtype} product")
    peak = measured_peak(device, dtype)
    say("compiling and timing")
    timing = time_workload(workload, task, timed, warmup)
    model = _model_flops(config, shape, workload, task)
    return {
        "task": task,
        "stage": config.stage,
        "base": config.model.base,
        "layers": shape.num_layers,
        "device": device.device_kind,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "dtype": dtype,
        "attention": config.model.attention,
        "remat": config.model.remat,
        "compile_seconds": timing.compile_seconds,
        "step_seconds_p50": timing.p50,
        "step_seconds_p90": timing.p90,
        **_rates(workload, timing),
        **_speed(timing, model, peak, peak_flops(device.device_kind), mesh.size),
        **(_memory_rate(workload, timing, device.device_kind) if task == "decode" else {}),
        "peak_memory": timing.peak_memory,
    }


def as_markdown(figures: dict[str, Any]) -> str:
    """The figures as a table for a person."""
    mesh = " x ".join(f"{name} {size}" for name, size in figures["mesh"].items() if size > 1) or "1"
    title = (
        f"{figures['task']}, {figures['stage']}, {figures['base']} ({figures['layers']} layers, random weights), "
        f"{figures['dtype']}, attention {figures['attention']}, remat {figures['remat']}\n"
        f"{figures['devices']} x {figures['device']} ({mesh})"
    )
    rows = ["| | |", "|---|---|"]
    names = {
        "compile_seconds": ("compilation", "s", 1.0),
        "step_seconds_p50": ("step, median", "ms", 1e3),
        "step_seconds_p90": ("step, 9 of 10 within", "ms", 1e3),
        "items_per_second_per_device": (f"{figures['unit']} per second and device", "", 1.0),
        "tokens_per_second_per_device": ("tokens read per second and device", "", 1.0),
        "model_tflops_per_device": ("model FLOPs", "TFLOP/s a device", 1.0),
        "hardware_tflops_per_device": ("hardware FLOPs (recomputation too)", "TFLOP/s a device", 1.0),
        "measured_peak_tflops": ("fastest product measured", "TFLOP/s", 1.0),
        "hardware_utilisation": ("hardware FLOPs, share of that", "%", 100.0),
        "model_utilisation": ("model FLOPs, share of that", "%", 100.0),
        "mfu": ("model FLOPs, share of the maker's peak (MFU)", "%", 100.0),
        "bytes_per_second": ("weights and cache read", "GB/s a device", 1e-9),
        "memory_utilisation": ("share of the maker's memory rate", "%", 100.0),
        "peak_memory": ("memory, most on a device", "GB", 1e-9),
    }
    for key, (name, unit, scale) in names.items():
        if key not in figures:
            continue
        value = figures[key]
        rows.append(f"| {name} | " + ("not known" if value is None else f"{value * scale:.4g} {unit}".strip()) + " |")
    return "\n\n".join([title, "\n".join(rows)])


def _rates(workload: Workload, timing: Timing) -> dict[str, Any]:
    per_device = 1 / timing.p50 / workload.mesh.size
    tokens = sum(
        math.prod(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(workload.arguments)
        if "valid" in str(path[-1])
    )
    tokens = workload.items if workload.unit == "tokens" else tokens
    return {
        "unit": workload.unit,
        "items_per_second_per_device": workload.items * per_device,
        "tokens_per_second_per_device": tokens * per_device,
    }


def _speed(timing: Timing, model: float, measured: float, maker: float | None, devices: int) -> dict[str, float | None]:
    per_second = 1 / timing.p50 / devices
    return {
        "model_tflops_per_device": model * per_second / 1e12,
        "hardware_tflops_per_device": timing.flops * per_second / 1e12,
        "measured_peak_tflops": measured / 1e12,
        "hardware_utilisation": timing.flops * per_second / measured,
        "model_utilisation": model * per_second / measured,
        "mfu": None if maker is None else model * per_second / maker,
    }


def _memory_rate(workload: Workload, timing: Timing, device_kind: str) -> dict[str, float | None]:
    """Bytes that one new token has to read, base weights and cache, over the time that it took."""
    cache = workload.arguments[2]
    size = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves((cache.keys, cache.values))
    )
    new = workload.items // cache.valid.shape[0]
    rate = new * (workload.base_bytes + size) / timing.p50
    known = device_kind in FIGURES
    return {"bytes_per_second": rate, "memory_utilisation": rate / chip_of(device_kind).memory_rate if known else None}


def _model_flops(config: TrainConfig, shape: DecoderConfig, workload: Workload, task: Task) -> float:
    """FLOPs that the model needs, without recomputation; rows are full, so padding has no part in it."""
    if task == "train":
        batch = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), workload.arguments[2])
        lengths = batch_lengths(batch)
        return step_flops(shape, config.lora.rank, config.stage, config.trains, lengths)
    if task == "compress":
        rows, length = workload.arguments[1].tokens.shape
        return forward_flops(shape, config.lora.rank, np.full(rows, length))
    cache = workload.arguments[2]
    rows, columns = cache.valid.shape
    longer, before = np.full(rows, columns), np.full(rows, columns - 1)
    new = workload.items // rows
    return new * (forward_flops(shape, config.lora.rank, longer) - forward_flops(shape, config.lora.rank, before))


if __name__ == "__main__":
    run_command(main)
