"""`python -m clara_jax.preflight --config FILE --topology v5e:4x4`: does a run fit its devices, and what holds it.

Compiles the real training step (or compression, or decoding) for TPUs that need not be there, on any machine. The
topology says how many devices there are: `mesh.data` of the file is not used, only one given on the command line.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import jax

from clara_jax.command_line import parse, say
from clara_jax.config import TrainConfig, train_config, train_parser
from clara_jax.errors import fail, run_command
from clara_jax.files import replace_text
from clara_jax.models.config import DecoderConfig
from clara_jax.planning import report
from clara_jax.planning.estimate import Estimate, estimate
from clara_jax.planning.known_models import shape_of
from clara_jax.planning.search import all_choices, describe, first_that_fits, whole_mesh
from clara_jax.planning.topology import topology_devices
from clara_jax.planning.workload import Sizes, Task, make_workload


def main() -> None:
    """Parse, compile, print. The exit status is 1 if the configuration does not fit."""
    jax.config.update("jax_platforms", "cpu")
    parser = train_parser("python -m clara_jax.preflight", (__doc__ or "").split(": ", 1)[1])
    parser.add_argument("--topology", type=str, required=True, help="TPU topology, for instance v5e:4x4.")
    parser.add_argument("--slices", type=int, default=1, help="Slices of that topology.")
    parser.add_argument("--task", type=Task, default="train", help="Which program; train, compress or decode.")
    parser.add_argument("--search", action="store_true", help="Try meshes and policies, and print a table.")
    parser.add_argument("--json", type=str, default=None, help="File for the figures.")
    parser.add_class_arguments(Sizes, "sizes")
    built = parse(parser)
    config = train_config(built)
    if not any(argument.startswith(("--mesh.data", "--mesh=")) for argument in sys.argv):
        config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=-1))
    if built.slices < 1:
        fail(f"slices is {built.slices}", "Give at least 1")
    shape = shape_of(config.model.base)
    devices = topology_devices(built.topology, built.slices)
    if built.search:
        tried = all_choices(config, shape, devices, built.sizes, built.task, say)
        print(report.table(tried))
        fits = any(found.fits for _, found in tried)
        figures: Any = [as_json(one, found) for one, found in tried]
    else:
        workload = make_workload(config, shape, whole_mesh(config, devices), built.sizes, built.task)
        found = estimate(workload)
        print(report.full(found, workload, layer_bytes(shape, 2)), flush=True)
        fits, figures = found.fits, as_json(config, found)
        if not fits:
            changed = first_that_fits(config, shape, devices, built.sizes, built.task, say)
            print("Nothing that was tried fits." if changed is None else f"This would fit: {describe(changed[0])}")
    if built.json is not None:
        replace_text(Path(built.json), json.dumps(figures, indent=1))
    sys.exit(0 if fits else 1)


def as_json(config: TrainConfig, found: Estimate) -> dict[str, Any]:
    """An estimate as plain numbers, with the options that lead to it; null for what is not known."""
    program = found.program
    return {
        "options": describe(config),
        "fits": found.fits,
        "memory": None if found.memory is None else dataclasses.asdict(found.memory),
        "missing": max(0, found.missing),
        "available": found.available,
        "base_bytes": found.base_bytes,
        "flops": found.flops,
        "traffic": None if program is None else program.traffic,
        "exchanged": None if program is None else program.by_kind(),
        "largest_gather": None if program is None else program.largest_gather,
        "seconds": found.seconds,
        "bound": found.bound,
        "compile_seconds": found.compile_seconds,
    }


def layer_bytes(shape: DecoderConfig, item_bytes: int) -> int:
    """Bytes of one layer's projections, whole."""
    return item_bytes * sum(math.prod(size) for size in shape.projections.values())


if __name__ == "__main__":
    run_command(main)
