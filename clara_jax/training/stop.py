"""Stopping a run in good order: SIGTERM (preemption, Slurm, Kubernetes) or Ctrl-C ends it after the next save."""

import signal
import threading
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils

# What a shell reports for a process that SIGTERM has ended; schedulers take the job for unfinished.
STOPPED_STATUS = 128 + signal.SIGTERM


class StopRequest:
    """While the block runs, the first SIGTERM or Ctrl-C is noted; a second Ctrl-C interrupts at once.

    In a run of several processes jax listens for SIGTERM on each, and all stop after the same step; Ctrl-C is
    passed on to it.
    """

    def __init__(self) -> None:
        self._noted = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        """Start listening (only the main thread can)."""
        if threading.current_thread() is threading.main_thread():
            ours = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else (signal.SIGINT,)
            for number in ours:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop listening."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def reached(self, step: int) -> bool:
        """Whether to save and stop after `step`. Every process must ask after every step."""
        if jax.process_count() == 1:
            return self._noted
        return multihost_utils.reached_preemption_sync_point(step)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._noted = True
        if jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)
