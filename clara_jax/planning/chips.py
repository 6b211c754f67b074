"""What accelerators can do, for a roofline: their makers' figures, per device as jax counts devices.

Peak FLOPs are in `clara_jax.training.flops`.
"""

import dataclasses

from clara_jax.errors import fail
from clara_jax.training.flops import peak_flops


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device: FLOPs in bfloat16, memory in bytes, and bytes per second.

    `memory_rate` is to and from its own memory, `link_rate` both directions of one axis of the links within a slice
    (or of NVLink), `network_rate` its share of the network between slices.
    """

    flops: float
    memory: float
    memory_rate: float
    link_rate: float
    network_rate: float


_GIB = 2.0**30
# By jax's device_kind: memory, memory_rate, link_rate, network_rate. The compiler keeps a part of the memory for
# itself: a v5e has 16 GiB, of which a program may use 15.75. TPU v2, v3, v4 (without megacore) and 7x have two devices
# a chip; the figures are halves of the chip's.
FIGURES: dict[str, tuple[float, float, float, float]] = {
    "TPU v4": (16 * _GIB, 0.6e12, 4.5e10, 3.1e9),
    "TPU v5 lite": (15.75 * _GIB, 8.1e11, 9e10, 3.1e9),
    "TPU v5": (95 * _GIB, 2.8e12, 1.8e11, 6.2e9),
    "TPU v6 lite": (31.25 * _GIB, 1.6e12, 1.8e11, 1.25e10),
    "TPU7x": (96 * _GIB, 3.7e12, 1.8e11, 6.2e9),
    "NVIDIA H100 80GB HBM3": (79.6 * _GIB, 3.35e12, 4.5e11, 5e10),
    "NVIDIA H200": (139.8 * _GIB, 4.8e12, 4.5e11, 5e10),
}


def chip_of(device_kind: str) -> Chip:
    """The device of jax's `device_kind`. Raises `UserError` for one without figures."""
    flops = peak_flops(device_kind)
    if flops is None or device_kind not in FIGURES:
        fail(f"nothing is known of a {device_kind}", f"Choose one of {', '.join(FIGURES)}")
    return Chip(flops, *FIGURES[device_kind])
