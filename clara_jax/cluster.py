"""Several processes as one run: joining, taking turns, and ending together when one of them is lost."""

import contextlib
import dataclasses
import os
import sys
import traceback
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from clara_jax.errors import UserError, fail


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """The processes of a run. Cloud TPU, Slurm, Kubernetes and MPI launchers are recognised: give nothing there.

    Args:
        coordinator: Address host:port at which the processes meet; that of process 0.
        processes: Number of processes; a run with another number is refused.
        process: Number of this process, from 0.
        lost_after: Seconds without a sign of life after which a process counts as lost and the others end.

    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    lost_after: int = 60

    def __post_init__(self) -> None:
        if (self.coordinator is None) != (self.process is None):
            fail("cluster.coordinator and cluster.process belong together", "Give both, or neither")
        if self.coordinator is not None and self.processes is None:
            fail("cluster.processes is missing beside cluster.coordinator", "Give the number of processes")
        if self.coordinator is not None and not self.coordinator.rpartition(":")[2].isdigit():
            fail(f"cluster.coordinator is '{self.coordinator}'", "Give host:port")
        if self.lost_after < 1:
            fail(f"cluster.lost_after is {self.lost_after}", "Give at least 1 second")


@contextlib.contextmanager
def joined(config: ClusterConfig) -> Iterator[None]:
    """The run's processes, joined for the time of the block.

    An error in one process of several ends it at once, without the farewell for which it would have to wait for
    the others; they find it lost and end too. Call before anything else of jax.
    """
    _join(config)
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        _report(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 2)


def is_main() -> bool:
    """Whether this is the process that prints and writes for all."""
    return jax.process_index() == 0


@contextlib.contextmanager
def main_first(name: str) -> Iterator[None]:
    """The block runs in the main process first, in the others after it."""
    if jax.process_count() == 1:
        yield
        return
    if not is_main():
        multihost_utils.sync_global_devices(name)
    yield
    if is_main():
        multihost_utils.sync_global_devices(name)


def _join(config: ClusterConfig) -> None:
    already = jax.distributed.is_initialized()
    if not already:
        try:
            jax.distributed.initialize(
                config.coordinator,
                config.processes if config.coordinator else None,
                config.process,
                heartbeat_timeout_seconds=config.lost_after,
                shutdown_timeout_seconds=config.lost_after,
            )
        except (ValueError, RuntimeError) as error:
            if config.coordinator is not None:
                raise UserError(f"cluster: {_first_line(error)}. Check cluster and the other processes.") from None
            # No launcher that jax knows (ValueError), or jax was in use before (called from Python): one process.
    if config.processes is not None and jax.process_count() != config.processes:
        fail(
            f"cluster.processes is {config.processes}, and {jax.process_count()} are running",
            "Start all of them, or correct the number",
        )


def _report(error: BaseException) -> None:
    where = f"error in process {jax.process_index()} of {jax.process_count()}"
    if isinstance(error, UserError):
        sys.stderr.write(f"{where}: {' '.join(str(error).split())}\n")
    elif isinstance(error, jax.errors.JaxRuntimeError):
        sys.stderr.write(
            f"{where}: another process was lost, or a device failed ({_first_line(error)}). "
            "See the other processes' logs; start all of them again to go on from the last checkpoint.\n"
        )
    elif not isinstance(error, SystemExit):
        sys.stderr.write(f"{where}:\n")
        traceback.print_exception(error)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
