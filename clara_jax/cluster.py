"""Several processes as one run: joining, taking turns, and ending together when one of them is lost."""

import contextlib
import dataclasses
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import NoReturn

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
        meet_within: Seconds in which all processes must have started and met, or those that have end.
        lost_after: Seconds without a sign of life after which a process counts as lost and the others end.

    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    meet_within: int = 300
    lost_after: int = 60

    def __post_init__(self) -> None:
        if (self.coordinator is None) != (self.process is None):
            fail("cluster.coordinator and cluster.process belong together", "Give both, or neither")
        if self.coordinator is not None and self.processes is None:
            fail("cluster.processes is missing beside cluster.coordinator", "Give the number of processes")
        if self.coordinator is not None and not self.coordinator.rpartition(":")[2].isdigit():
            fail(f"cluster.coordinator is '{self.coordinator}'", "Give host:port")
        for key in ("meet_within", "lost_after"):
            if getattr(self, key) < 1:
                fail(f"cluster.{key} is {getattr(self, key)}", "Give at least 1 second")


@contextlib.contextmanager
def joined(config: ClusterConfig) -> Iterator[None]:
    """The run's processes, joined for the time of the block.

    An error in one process of several ends it at once, without the farewell for which it would have to wait for
    the others; they find it lost and end too. Where they compute they find it when the connection breaks; where
    they wait for a device or at a barrier, jax ends them after `lost_after` seconds ("Terminating process because
    the JAX distributed service detected fatal errors", status 134). Call before anything else of jax.
    """
    _join(config)
    try:
        yield
    except SystemExit:
        raise  # all stop, after the same step
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        _report(error)
        _end()


def is_main() -> bool:
    """Whether this is the process that prints and writes for all."""
    return jax.process_index() == 0


def is_loss(error: BaseException | None) -> bool:
    """Whether jax has raised `error`, or what caused it, because another process was lost (or a device failed)."""
    if error is None or jax.process_count() == 1:
        return False
    said = isinstance(error, ValueError) and re.match(r"[A-Z_]+: (Gloo|NCCL)", str(error))
    return isinstance(error, jax.errors.JaxRuntimeError) or bool(said) or is_loss(error.__cause__)


@contextlib.contextmanager
def main_first(name: str) -> Iterator[None]:
    """The block runs in the main process first, in the others after it."""
    if not is_main():
        meet(name)
    yield
    if is_main():
        meet(name)


def meet(name: str) -> None:
    """Wait until all processes have come to the point of that name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _join(config: ClusterConfig) -> None:
    already = jax.distributed.is_initialized()
    if not already:
        try:
            with _meeting(config):
                jax.distributed.initialize(
                    config.coordinator,
                    config.processes if config.coordinator else None,
                    config.process,
                    initialization_timeout=config.meet_within + 60,  # `_meeting` comes first, and says it clearly
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


@contextlib.contextmanager
def _meeting(config: ClusterConfig) -> Iterator[None]:
    """The block ends within `meet_within` seconds, or the process does: jax itself would abort with a stack trace."""

    def missed() -> None:
        where = f" at {config.coordinator}" if config.coordinator else ""
        sys.stderr.write(
            f"error: cluster: the processes have not all met{where} within {config.meet_within} s. See that each of "
            "them is started and can reach that of process 0, or raise cluster.meet_within.\n"
        )
        _end()

    timer = threading.Timer(config.meet_within, missed)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end() -> NoReturn:
    """End this process now, whatever waits for other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2)


def _report(error: BaseException) -> None:
    where = f"error in process {jax.process_index()} of {jax.process_count()}"
    if isinstance(error, UserError):
        sys.stderr.write(f"{where}: {' '.join(str(error).split())}\n")
    elif is_loss(error):
        sys.stderr.write(
            f"{where}: another process was lost, or a device failed ({_first_line(error)}). "
            "See the other processes' logs; start all of them again to go on from the last checkpoint.\n"
        )
    elif isinstance(error, KeyboardInterrupt):
        sys.stderr.write(f"{where}: interrupted\n")
    else:
        sys.stderr.write(f"{where}:\n")
        traceback.print_exception(error)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]
