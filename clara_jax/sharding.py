"""The device mesh, and one table from a parameter's axes to mesh axes.

    data    copies of the model, each on its part of the batch; only adapter gradients pass between them
    fsdp    the batch and the base weights, both divided
    tensor  attention heads and the width of the MLP

Adapters, memory tokens and the optimizer's moments are whole on every device: they are small.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from clara_jax.errors import fail

F = TypeVar("F", bound=Callable[..., Any])
DATA, FSDP, TENSOR = "data", "fsdp", "tensor"

# Mesh axes of the last two axes of each base parameter; layers are stacked on an axis in front, which is never
# divided, and neither is the vocabulary.
Axes = tuple[str | None, ...]
_INTO_HEADS, _OUT_OF_HEADS = (FSDP, TENSOR), (TENSOR, FSDP)
BASE_AXES: dict[str, Axes] = {
    "embed": (None, FSDP),
    "head": (FSDP, None),
    "q_proj": _INTO_HEADS,
    "k_proj": _INTO_HEADS,
    "v_proj": _INTO_HEADS,
    "o_proj": _OUT_OF_HEADS,
    "gate_proj": _INTO_HEADS,
    "up_proj": _INTO_HEADS,
    "down_proj": _OUT_OF_HEADS,
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis of the mesh has.

    Args:
        data: Copies of the model, each on its part of the batch; -1 takes all devices that are left.
        fsdp: Devices that share one copy's base weights and its part of the batch.
        tensor: Devices that share the attention heads and the MLP of every layer.

    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for key in ("fsdp", "tensor"):
            if getattr(self, key) < 1:
                fail(f"mesh.{key} is {getattr(self, key)}", "Give at least 1")
        if self.data < 1 and self.data != -1:
            fail(f"mesh.data is {self.data}", "Give at least 1, or -1 for all devices that are left")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (by default all).

    A run of one process may name a mesh of fewer devices. Where the devices are those of several slices of a pod, or of
    other groups that a slower network joins, `data` goes across the slices, and `fsdp` and `tensor` stay within one.
    Raises `UserError` for any mesh that does not fit.
    """
    every = devices = jax.devices() if devices is None else devices
    inner = config.fsdp * config.tensor
    data = len(devices) // inner if config.data == -1 else config.data
    if config.data != -1 and jax.process_count() == 1:
        devices = devices[: data * inner]
    if data * inner != len(devices) or data == 0:
        asked = f"data {config.data} x fsdp {config.fsdp} x tensor {config.tensor}"
        fail(
            f"mesh: {asked} does not fit the {len(devices)} devices of this run",
            "Change mesh, or start the run on as many devices as it names",
        )
    axes, types = (DATA, FSDP, TENSOR), (AxisType.Auto,) * 3
    if len(devices) < len(every):  # a part of them has no regular place in the machine that could be made use of
        return Mesh(np.asarray(devices).reshape(data, config.fsdp, config.tensor), axes, axis_types=types)
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if slices == 1:
        shape = (data, config.fsdp, config.tensor)
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(placed, axes, axis_types=types)
    if data % slices:
        fail(
            f"mesh.data is {data}, and the devices are those of {slices} slices, each of which holds whole copies",
            f"Choose a mesh.data that {slices} divides",
        )
    within = (data // slices, config.fsdp, config.tensor)
    placed = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices, allow_split_physical_axes=True)
    return Mesh(placed, axes, axis_types=types)


def base_sharding(mesh: Mesh, path: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
    """Where the base parameter at `path` (for instance layers, q_proj, kernel) lies on the mesh.

    Raises `UserError` where an axis of the mesh does not divide the parameter.
    """
    name = path[1] if path[0] == "layers" else path[0]
    axes = BASE_AXES.get(name, ())
    axes = axes[1:] if path[-1] == "bias" else axes
    spec = (None,) * (len(shape) - len(axes)) + axes
    for size, axis in zip(shape, spec, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            fail(
                f"mesh.{axis} is {mesh.shape[axis]}, which does not divide the {size} entries of {'.'.join(path)}",
                f"Choose a mesh.{axis} that does",
            )
    return NamedSharding(mesh, P(*spec))


def check_heads(mesh: Mesh, num_heads: int, num_kv_heads: int) -> None:
    """Refuse a `tensor` axis that would cut an attention head in two."""
    for name, heads in (("attention heads", num_heads), ("key-value heads", num_kv_heads)):
        if heads % mesh.shape[TENSOR]:
            fail(
                f"mesh.tensor is {mesh.shape[TENSOR]}, and the base model has {heads} {name}",
                "Choose a mesh.tensor that divides them",
            )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch: over `data`, and within it over `fsdp`."""
    return NamedSharding(mesh, P((DATA, FSDP)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, P())


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a batch that this process's devices hold, in order."""
    owned = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for index in owned if index for row in range(*index[0].indices(batch_size))})


def place_batch(mesh: Mesh, batch: Any, batch_size: int) -> Any:
    """A batch of global arrays from this process's rows (`local_rows`) of every leaf."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)

    def place(leaf: np.ndarray) -> Array:
        return jax.make_array_from_process_local_data(sharding, leaf, (batch_size, *leaf.shape[1:]))

    return jax.tree.map(place, batch)


def place(value: Any, sharding: Sharding) -> Array:
    """A global array from the same `value` on every process; random keys too."""
    if jax.process_count() == 1 or (isinstance(value, jax.Array) and not value.is_fully_addressable):
        return jax.device_put(value, sharding)
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(place(jax.random.key_data(value), sharding))
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def fetch(x: Array) -> np.ndarray:
    """A global array on every process's host; all processes have to ask for it if it lies on several."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def shard_rows(x: Array) -> Array:
    """`x` with its rows over those batch axes of the surrounding mesh that the compiler divides work by.

    Without it the compiler is free to keep activations whole and to divide what is worse. No mesh, no effect.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(name for name in (DATA, FSDP) if _is_auto(mesh, name))
    if not axes or x.shape[0] % math.prod(mesh.shape[name] for name in axes):
        return x
    return jax.lax.with_sharding_constraint(x, P(axes))


def look_up(table: Float[Array, "entries hidden"], tokens: Int[Array, "rows length"]) -> Array:
    """Rows of a frozen embedding table that lies as `base_sharding` says, [rows, length, hidden].

    In a partly manual region XLA's partitioner aborts on a gather from a divided table (jax 0.10 to 0.12), so the
    exchange is written out there: every device looks its part of hidden up for all rows, then parts are
    exchanged for rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.manual_axes or mesh.shape[FSDP] == 1:
        return jnp.take(table, tokens, axis=0)

    def of_device(table: Array, tokens: Array) -> Array:
        part = jnp.take(table, jax.lax.all_gather(tokens, FSDP, tiled=True), axis=0)
        return jax.lax.all_to_all(part, FSDP, split_axis=0, concat_axis=2, tiled=True)

    return jax.shard_map(of_device, in_specs=(P(None, FSDP), P(FSDP)), out_specs=P(FSDP), axis_names={FSDP, TENSOR})(
        table, tokens
    )


def over_vocabulary(x: Float[Array, "*rows vocab"]) -> Array:
    """`x` with its last axis, the vocabulary, over `fsdp` of the surrounding mesh, and its other axes whole.

    Filled up with zeros to what `fsdp` divides. For the output head and the logits: parts of a head that lies as
    `base_sharding` says change places, where it would else be gathered whole on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not _is_auto(mesh, FSDP) or mesh.shape[FSDP] == 1:
        return x
    others = (None,) * (x.ndim - 1)
    filled = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % mesh.shape[FSDP])])
    return jax.lax.with_sharding_constraint(filled, P(*others, FSDP))


def over_rows_and_heads(function: F, heads: Sequence[int | None], out_heads: int) -> F:
    """`function` on each device's own rows (first axes) and heads, for kernels that the compiler cannot divide.

    `heads[i]` is the axis of argument i that counts heads (None: it has none), `out_heads` that of the result. The mesh
    is the surrounding one; without one, `function` itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows = tuple(name for name in (DATA, FSDP) if _is_auto(mesh, name))
    if not rows:
        return function

    def spec(axis: int | None) -> P:
        return P(rows) if axis is None else P(rows, *(None,) * (axis - 1), TENSOR)

    specs = tuple(map(spec, heads))
    # A kernel does not say over which axes its result varies.
    names = {*rows, TENSOR}
    return jax.shard_map(function, in_specs=specs, out_specs=spec(out_heads), axis_names=names, check_vma=False)


def on_mesh(mesh: Mesh, function: F) -> F:
    """`function` traced with `mesh` around it, so that `shard_rows` inside knows its axes."""

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return cast(F, traced)


def vary_as(x: Array, other: Array) -> Array:
    """`x` typed as differing between the shards that `other` differs between: factors with a rule of their own must."""
    has, wanted = (jax.typeof(one).manual_axis_type.varying for one in (x, other))
    missing = tuple(wanted - has)
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _is_auto(mesh: Any, name: str) -> bool:
    return name in mesh.axis_names and mesh.axis_types[mesh.axis_names.index(name)] == AxisType.Auto
