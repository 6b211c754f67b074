"""A workload timed on the devices of its mesh, beside the fastest product that such a device was seen to do."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clara_jax.models.precision import of_products
from clara_jax.planning.flops import program_flops
from clara_jax.planning.random_inputs import random_arguments
from clara_jax.planning.workload import Task, Workload


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one execution (p50 and p90 over `steps`) and of the compilation; FLOPs of one execution, all devices.

    `peak_memory` is in bytes on the device that has most, None where the platform does not tell.
    """

    compile_seconds: float
    seconds: list[float]
    flops: float
    peak_memory: int | None

    @property
    def p50(self) -> float:
        """The median."""
        return statistics.median(self.seconds)

    @property
    def p90(self) -> float:
        """Nine tenths of the executions took at most so long."""
        return float(np.quantile(self.seconds, 0.9))


def time_workload(workload: Workload, task: Task, steps: int, warmup: int) -> Timing:
    """Compile, run `warmup` times unseen, then `steps` times, each waited for."""
    arguments = random_arguments(workload)
    start = time.perf_counter()
    traced = workload.function.trace(*arguments)
    compiled = traced.lower().compile()
    compile_seconds = time.perf_counter() - start
    seconds = []
    for number in range(warmup + steps):
        start = time.perf_counter()
        result = jax.block_until_ready(compiled(*arguments))
        if number >= warmup:
            seconds.append(time.perf_counter() - start)
        arguments = _next(task, arguments, result)
    return Timing(compile_seconds, seconds, program_flops(traced.jaxpr), _peak_memory(workload, compiled))


def measured_peak(device: jax.Device, dtype: Any, seconds: float = 2.0) -> float:
    """FLOPs per second of the fastest square product of `dtype` that was seen on `device` within some `seconds`."""
    best = 0.0
    sizes = (1024, 2048) if device.platform == "cpu" else (4096, 8192, 16384)
    for size in sizes:
        # Random numbers, of a size that products keep: constant ones draw less power, and are multiplied faster.
        factor = jax.random.normal(jax.random.key(0), (size, size)) / size**0.5
        left = jax.device_put(factor.astype(dtype), device)
        multiply = _chained(8)
        jax.block_until_ready(multiply(left))
        end = time.perf_counter() + seconds / len(sizes)
        while time.perf_counter() < end:
            start = time.perf_counter()
            jax.block_until_ready(multiply(left))
            best = max(best, 8 * 2.0 * size**3 / (time.perf_counter() - start))
    return best


def _chained(times: int) -> Callable[[jax.Array], jax.Array]:
    """So many products one after the other, so that what starting one costs does not count."""

    def multiply(x: jax.Array) -> jax.Array:
        y = x
        for _ in range(times):
            y = jnp.matmul(y, x, precision=of_products(x.dtype))
        return y

    return jax.jit(multiply)


def _next(task: Task, arguments: tuple[Any, ...], result: Any) -> tuple[Any, ...]:
    """The arguments of the next execution: what was donated is replaced by what came of it."""
    if task == "train":
        return (result[0], *arguments[1:])
    return (*arguments[:2], result[1]) if task == "decode" else arguments


def _peak_memory(workload: Workload, compiled: Any) -> int | None:
    stats = [device.memory_stats() for device in workload.mesh.local_devices]
    known = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if known:
        return max(known)
    found = compiled.memory_analysis()
    if found is None:
        return None
    return int(
        found.argument_size_in_bytes + found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    )
