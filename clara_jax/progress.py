"""How far a long piece of work is, counted in things: a bar for a person, plain lines for the log of a job."""

import sys
import time

from tqdm import tqdm

_EVERY = 10.0  # seconds between two lines


class CountProgress:
    """Shows `1200/5000 documents, 35.2/s, eta 01:48`, as a bar where standard error is a terminal."""

    def __init__(self, total: int, unit: str):
        """Begin at 0 of `total`."""
        self._total, self._unit, self._done = total, unit, 0.0
        self._bar = tqdm(total=total, unit=unit, file=sys.stderr, dynamic_ncols=True) if sys.stderr.isatty() else None
        self._start = self._said = time.monotonic()

    def advance(self, done: float | int) -> None:
        """Count so many more; parts of one add up."""
        self._done += done
        if self._bar is not None:
            self._bar.update(round(self._done) - self._bar.n)
            return
        now = time.monotonic()
        if now - self._said >= _EVERY:
            self._said, speed = now, self._done / (now - self._start)
            left = tqdm.format_interval((self._total - self._done) / speed) if speed else "?"
            print(
                f"{self._done:.0f}/{self._total} {self._unit}s, {speed:.1f}/s, eta {left}", file=sys.stderr, flush=True
            )

    def close(self) -> None:
        """Leave the bar as it is and go to the next line."""
        if self._bar is not None:
            self._bar.close()
