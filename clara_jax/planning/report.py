"""Estimates as text: one in full, several as a table."""

import math
from collections.abc import Sequence

from clara_jax.planning.estimate import Estimate
from clara_jax.planning.hlo import Program
from clara_jax.planning.search import Tried, describe
from clara_jax.planning.workload import Workload

_GB = 1e9


def full(found: Estimate, workload: Workload, layer_bytes: int) -> str:
    """Everything about one estimate. `layer_bytes` are those of one layer's base weights, whole."""
    mesh, devices = workload.mesh, workload.mesh.size
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    lines = [
        f"{devices} x {mesh.devices.flat[0].device_kind} ({axes}), compiled in {found.compile_seconds:.0f} s",
        "",
        *_memory(found),
        "",
        f"work per device        {found.flops / 1e12:10.1f} TFLOP (products, recomputation and padding counted)",
        *_program(found.program, layer_bytes),
    ]
    if found.memory is not None:
        lines += ["", "roofline, seconds that each would take alone"]
        lines += [f"  {name:<20} {seconds:10.4f}" for name, seconds in found.seconds.items()]
        rate = workload.items / found.step_seconds
        held = "" if found.program is None else f", held by {found.bound}"
        lines.append(
            f"at least {found.step_seconds:.3f} s a step{held}: "
            f"{rate:.0f} {workload.unit}/s at most, {rate / devices:.2f} per device"
        )
    return "\n".join(lines)


def table(tried: Sequence[Tried]) -> str:
    """A Markdown table, a row per choice."""
    rows = [
        "| choice | fits | GB a device | of it base | at least | held by | links | compile |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for config, found in tried:
        total = math.nan if found.memory is None else found.memory.total / _GB
        fits = "yes" if found.fits else f"{found.missing / _GB:.1f} GB too few"
        size = f"{total:.1f} of {found.available / _GB:.1f}" if found.memory is not None else "-"
        links = f"{found.seconds['links']:.3f} s" if "links" in found.seconds else "-"
        rows.append(
            f"| `{describe(config)}` | {fits} | {size} | {found.base_bytes / _GB:.1f} | {found.step_seconds:.3f} s | "
            f"{found.bound} | {links} | {found.compile_seconds:.0f} s |"
        )
    return "\n".join(rows)


def _program(program: Program | None, layer_bytes: int) -> list[str]:
    if program is None:
        return ["memory traffic and exchanges are not known: there is no text of a compiled program"]
    lines = [f"memory traffic         {program.traffic / _GB:10.1f} GB"]
    for kind, (times, size) in sorted(program.by_kind().items()):
        lines.append(f"{kind:<22} {size / _GB:10.2f} GB in {times} exchanges (results)")
    if program.collectives:
        share = program.largest_gather / layer_bytes
        lines.append(
            f"largest all-gather     {program.largest_gather / _GB:10.3f} GB, {share:.2f} of one layer's weights "
            f"({layer_bytes / _GB:.3f} GB)"
        )
    return lines


def _memory(found: Estimate) -> list[str]:
    available = found.available / _GB
    if found.memory is None:
        return [
            f"does not fit: the compiler finds {found.missing / _GB:.1f} GB too few of {available:.1f} GB a device",
            f"  base weights         {found.base_bytes / _GB:10.2f} GB",
        ]
    memory = found.memory
    verdict = "fits" if found.fits else f"does not fit: {found.missing / _GB:.1f} GB too few"
    return [
        f"{verdict}: {memory.total / _GB:.2f} GB of {available:.1f} GB a device",
        f"  base weights         {found.base_bytes / _GB:10.2f} GB",
        f"  other arguments      {(memory.arguments - found.base_bytes) / _GB:10.2f} GB (adapters, moments, batch)",
        f"  temporaries          {memory.temporaries / _GB:10.2f} GB",
        f"  results              {memory.results / _GB:10.2f} GB (what is not written over arguments)",
        f"  program              {memory.code / _GB:10.2f} GB",
    ]
