"""What a training run shows in the terminal: a bar for a person, plain lines for the log of a job."""

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

# Shown of the values of a training step; the files have them all.
_SHOWN = {
    "loss": "loss {:.4f}",
    "learning_rate": "lr {:.1e}",
    "target_tokens_per_second": "{:.0f} tok/s",
    "step_seconds": "{:.2f} s/step",
}


class ProgressBar:
    """A bar that redraws itself, by tqdm; evaluations are printed above it."""

    def __init__(self, first_step: int, steps: int):
        """Start at `first_step` of `steps`."""
        self._steps = steps
        self._bar = tqdm(total=steps, initial=first_step, unit="step", file=sys.stderr, dynamic_ncols=True)

    def advance(self) -> None:
        """Move by one step."""
        self._bar.update()

    def show(self, step: int, values: Mapping[str, float | int]) -> None:
        """Values of training beside the bar, others above it."""
        if values.keys() & _SHOWN.keys():
            self._bar.set_postfix_str(describe(values))
        else:
            self._bar.write(f"step {step}/{self._steps} {describe(values)}", file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it is and go to the next line."""
        self._bar.close()


class ProgressLines:
    """Lines such as `step 120/1000 loss 1.2345 lr 1.0e-04 3456 tok/s 0.52 s/step eta 07:38`."""

    def __init__(self, first_step: int, steps: int):
        """Start at `first_step` of `steps`."""
        self._done, self._steps = first_step, steps
        self._first: tuple[int, float] | None = None  # the first step done here, and when

    def advance(self) -> None:
        """Count one step."""
        self._done += 1
        # The first step compiles: what it took says nothing about those to come.
        self._first = self._first or (self._done, time.monotonic())

    def show(self, step: int, values: Mapping[str, float | int]) -> None:
        """Print a line; the time left only beside values of training."""
        left = f" eta {self._time_left()}" if values.keys() & _SHOWN.keys() else ""
        print(f"step {step}/{self._steps} {describe(values)}{left}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing is open."""

    def _time_left(self) -> str:
        if self._first is None or self._done == self._first[0]:
            return "?"
        step, since = self._first
        return tqdm.format_interval((self._steps - self._done) * (time.monotonic() - since) / (self._done - step))


def open_progress(first_step: int, steps: int) -> ProgressBar | ProgressLines:
    """A bar where standard error is a terminal, else one line per logged step; `first_step` steps are done."""
    return ProgressBar(first_step, steps) if sys.stderr.isatty() else ProgressLines(first_step, steps)


def describe(values: Mapping[str, float | int]) -> str:
    """What is shown of a training step's values; values of another kind (an evaluation's) are all shown."""
    shown = [text.format(values[name]) for name, text in _SHOWN.items() if name in values]
    return " ".join(shown or [f"{name} {value:.4f}" for name, value in values.items()])
