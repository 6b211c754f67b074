"""Meshes, remat policies and micro-batches of a configuration, and which of them fit."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
from jax.sharding import Mesh

from clara_jax.config import TrainConfig
from clara_jax.errors import UserError, fail
from clara_jax.models.config import DecoderConfig
from clara_jax.models.remat import RematPolicy
from clara_jax.planning.estimate import Estimate, estimate
from clara_jax.planning.workload import Sizes, Task, make_workload
from clara_jax.sharding import DATA, FSDP, TENSOR, MeshConfig, make_mesh

Tried = tuple[TrainConfig, Estimate]


def estimate_config(
    config: TrainConfig, shape: DecoderConfig, devices: Sequence[jax.Device], sizes: Sizes, task: Task
) -> Estimate:
    """The estimate of `task` under `config`. Raises `UserError` for a mesh that does not divide model or batch."""
    return estimate(make_workload(config, shape, whole_mesh(config, devices), sizes, task))


def whole_mesh(config: TrainConfig, devices: Sequence[jax.Device]) -> Mesh:
    """The configured mesh over all of the devices. Raises `UserError` where it leaves some out, or does not fit."""
    mesh = make_mesh(config.mesh, devices)
    if mesh.size < len(devices):
        fail(
            f"mesh: data {mesh.shape[DATA]} x fsdp {mesh.shape[FSDP]} x tensor {mesh.shape[TENSOR]} is "
            f"{mesh.size} devices, and the topology has {len(devices)}",
            "Give mesh.data -1 for all of them, or a smaller topology",
        )
    return mesh


def first_that_fits(
    config: TrainConfig,
    shape: DecoderConfig,
    devices: Sequence[jax.Device],
    sizes: Sizes,
    task: Task,
    report: Callable[[str], None],
) -> Tried | None:
    """The configuration changed as little as it takes to fit: more fsdp, then less kept, then smaller parts."""
    tried = _try_all(_smaller(config, len(devices)), shape, devices, sizes, task, report)
    return next((one for one in tried if one[1].fits), None)


def all_choices(
    config: TrainConfig,
    shape: DecoderConfig,
    devices: Sequence[jax.Device],
    sizes: Sizes,
    task: Task,
    report: Callable[[str], None],
) -> list[Tried]:
    """Every mesh of powers of two with few model axes, each with the policies and parts that may pay, fastest first."""
    tried = _try_all(_choices(config, len(devices), task), shape, devices, sizes, task, report)
    return sorted(tried, key=lambda one: (not one[1].fits, one[1].program is None, one[1].step_seconds))


def describe(config: TrainConfig) -> str:
    """The options that give this choice."""
    mesh = config.mesh
    return (
        f"--mesh.data={mesh.data} --mesh.fsdp={mesh.fsdp} --mesh.tensor={mesh.tensor} "
        f"--model.remat={config.model.remat} --micro_batches={config.micro_batches}"
    )


def _try_all(
    candidates: Iterable[TrainConfig],
    shape: DecoderConfig,
    devices: Sequence[jax.Device],
    sizes: Sizes,
    task: Task,
    report: Callable[[str], None],
) -> Iterator[Tried]:
    """The candidates with their estimates, one by one, without those that do not divide the model or the batch."""
    for candidate in candidates:
        try:
            found = estimate_config(candidate, shape, devices, sizes, task)
        except UserError as error:
            report(f"left out {describe(candidate)}: {error}")
            continue
        outcome = "it fits" if found.fits else f"{found.missing / 1e9:.1f} GB too few"
        report(f"tried {describe(candidate)}: {outcome}")
        yield candidate, found


def _smaller(config: TrainConfig, devices: int) -> Iterator[TrainConfig]:
    fsdp, tensor = config.mesh.fsdp, config.mesh.tensor
    while fsdp * 2 * tensor <= devices and fsdp < 16:
        fsdp *= 2
        if fsdp >= 8 or fsdp * tensor * 2 > devices:
            yield _with(config, MeshConfig(devices // (fsdp * tensor), fsdp, tensor))
    mesh = MeshConfig(devices // (fsdp * tensor), fsdp, tensor)
    if config.model.remat != "nothing":
        yield _with(config, mesh, "nothing")
    parts = config.micro_batches
    while config.batch_size % (2 * parts * mesh.data * mesh.fsdp) == 0:
        parts *= 2
        yield _with(config, mesh, "nothing", parts)


def _choices(config: TrainConfig, devices: int, task: Task) -> Iterator[TrainConfig]:
    policies: tuple[RematPolicy, ...] = ("lora", "nothing") if task == "train" else (config.model.remat,)
    for tensor in (1, 2):
        for fsdp in (1, 2, 4, 8, 16, 32):
            if devices % (fsdp * tensor):
                continue
            for policy in policies:
                mesh = MeshConfig(devices // (fsdp * tensor), fsdp, tensor)
                yield _with(config, mesh, policy)


def _with(
    config: TrainConfig, mesh: MeshConfig, remat: RematPolicy | None = None, micro_batches: int | None = None
) -> TrainConfig:
    model = config.model if remat is None else dataclasses.replace(config.model, remat=remat)
    parts = micro_batches or config.micro_batches
    return dataclasses.replace(config, mesh=mesh, model=model, micro_batches=parts)
