"""What a program costs on devices that need not be there: memory, work and exchange, read from its compilation.

The roofline's times are what each resource alone would take at its full rate: matrix units, memory, links within a
slice, network between slices. The largest is a bound from below of one execution; whether the others hide behind it is
the compiler's and the hardware's affair.
"""

import dataclasses
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from clara_jax.planning.chips import Chip, chip_of
from clara_jax.planning.flops import program_flops
from clara_jax.planning.hlo import Collective, Program, read_program
from clara_jax.planning.workload import Workload

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "": 1}
_TEXT = "*after_optimizations.txt"  # the file of a compiled program's text, on every backend of XLA


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device: base, adapters, moments and batch are `arguments`; `results` are not written over them."""

    arguments: int
    temporaries: int
    results: int
    code: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.arguments + self.temporaries + self.results + self.code


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One compiled program on one mesh. FLOPs and bytes are of one execution on each device.

    `memory` is None where it does not fit, `missing` says then how many bytes there are too few. `program` is what the
    compiled text says, None where there is none: of `seconds`, the roofline's times by resource, only those of the
    matrix units are known then.
    """

    memory: Memory | None
    missing: int
    available: float
    base_bytes: int
    flops: float
    program: Program | None
    seconds: dict[str, float]
    compile_seconds: float

    @property
    def fits(self) -> bool:
        """Whether the program fits the devices' memory."""
        return self.memory is not None and self.missing <= 0

    @property
    def bound(self) -> str:
        """The resource that holds the program."""
        return "not known" if self.program is None else max(self.seconds, key=self.seconds.__getitem__)

    @property
    def step_seconds(self) -> float:
        """The roofline's time of one execution."""
        return max(self.seconds.values())


def estimate(workload: Workload) -> Estimate:
    """Compile the workload for the devices of its mesh, and read what it costs."""
    devices = list(workload.mesh.devices.flat)
    chip = chip_of(devices[0].device_kind)
    start = time.perf_counter()
    traced = workload.function.trace(*workload.arguments)
    flops = program_flops(traced.jaxpr) / len(devices)
    seconds = {"matrix units": flops / chip.flops}
    try:
        compiled, text = _compile(traced.lower())
    except jax.errors.JaxRuntimeError as error:
        missing = _missing(str(error))
        if missing is None:
            raise
        took = time.perf_counter() - start
        return Estimate(None, missing, chip.memory, workload.base_bytes, flops, None, seconds, took)
    took = time.perf_counter() - start
    program = None if text is None else read_program(text)
    stats: Any = compiled.memory_analysis()
    memory = Memory(
        stats.argument_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.output_size_in_bytes - stats.alias_size_in_bytes,
        stats.generated_code_size_in_bytes,
    )
    return Estimate(
        memory=memory,
        missing=int(memory.total - chip.memory),
        available=chip.memory,
        base_bytes=workload.base_bytes,
        flops=flops,
        program=program,
        seconds=seconds if program is None else roofline(program, flops, chip, devices),
        compile_seconds=took,
    )


def roofline(program: Program, flops: float, chip: Chip, devices: Sequence[jax.Device]) -> dict[str, float]:
    """Seconds that each resource alone would take."""
    slices = [getattr(device, "slice_index", None) or 0 for device in devices]
    links = network = 0.0
    for one in program.collectives:
        within, between = _moved(one, [slices[place] for place in one.devices])
        links += one.times * within
        network += one.times * between
    times = {
        "matrix units": flops / chip.flops,
        "memory": program.traffic / chip.memory_rate,
        "links": links / chip.link_rate,
    }
    return times | ({"network": network / chip.network_rate} if len(set(slices)) > 1 else {})


def _compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str | None]:
    """The compiled program and its text, None if the compiler leaves none.

    Not `compiled.as_text()`: libtpu 0.0.52 cannot read back what it makes of a scatter or an exchange on SparseCores
    (v5p, v6e, 7x).
    """
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        files = list(Path(folder).glob(_TEXT))
        return compiled, files[0].read_text() if len(files) == 1 else None


def _moved(one: Collective, slices: Sequence[int]) -> tuple[float, float]:
    """Bytes that one execution sends from each device, within its slice and between slices (ring algorithms)."""
    number = len(set(slices))
    inside = max(1, one.group // number)

    def ring(group: int) -> float:
        if one.kind == "collective-permute":
            return float(one.bytes)
        if one.kind == "reduce-scatter":
            return one.bytes * (group - 1.0)
        return one.bytes * (2.0 if one.kind == "all-reduce" else 1.0) * (group - 1) / group

    if number == 1:
        return ring(one.group), 0.0
    return ring(inside) if inside > 1 else 0.0, ring(number) / inside


def _missing(message: str) -> int | None:
    """The bytes that the compiler says are too few, None if it failed for another reason."""
    found = re.search(r"[Ee]xceeded hbm capacity by ([\d.]+)([KMG]?)", message)
    return int(float(found[1]) * _UNITS[found[2]]) if found else None
