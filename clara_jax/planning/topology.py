"""TPU topologies that are not there, for compiling ahead of time on any machine with the `libtpu` wheel."""

import importlib.util
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from clara_jax.errors import fail

_EXAMPLES = "for instance v5e:4x4, v5p:4x4x8, v6e:16x16, v4:2x2x4 or tpu7x:2x2x2"


def topology_devices(name: str, slices: int = 1) -> Sequence[jax.Device]:
    """The devices of `slices` slices of the TPU topology `name`, generation:chips along each axis.

    Raises `UserError` where libtpu is missing or knows no such topology.
    """
    if re.match(r"(gpu|cuda|a100|h100|h200|b200)\b", name):
        fail(
            f"topology is {name}, and programs for GPUs can be compiled only where there is one",
            "Run clara_jax.benchmark on such a machine; it works with random weights and fewer layers",
        )
    if importlib.util.find_spec("libtpu") is None:
        fail(
            "the compiler for TPU, libtpu, is not installed",
            "Install it: pip install 'clara_jax[tpu-preflight]'",
        )
    # libtpu looks for the machine's own TPU and complains at length if there is none.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # it takes no device, so several may run
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5e-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    more = {} if slices == 1 else {"num_slices": slices}
    asked = name.replace("v7x:", "tpu7x:")
    try:
        return topologies.get_topology_desc(asked, "tpu", **more).devices
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        said = str(error).strip().split("\n")[0].removeprefix("INVALID_ARGUMENT: ").rstrip(".")
        fail(f"topology is {name}, which libtpu does not take ({said})", f"Give one, {_EXAMPLES}")
