"""Where a run's numbers go: `metrics.jsonl`, TensorBoard and the terminal."""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from clara_jax.errors import fail
from clara_jax.files import replace_bytes
from clara_jax.training.event_file import EventFile
from clara_jax.training.progress import open_progress


class MetricsLog:
    """Writes metrics to all three places, and text to TensorBoard.

    A line of `metrics.jsonl` is an object: `{"step": 20, "loss": 1.25, ...}`, `{"step": 20, "evaluation/loss": ...}`.
    Numbers have all their digits. JSON knows no NaN and no infinity: they are written as null, which pandas reads as
    a missing number; TensorBoard has them as they are.

    Every method raises `UserError` where the run directory cannot be written, as on a full disk.
    """

    def __init__(self, run_dir: Path, first_step: int, steps: int, enabled: bool = True):
        """Open the files of `run_dir`, an existing folder, for the steps after `first_step` up to `steps`.

        What is there of later steps is dropped: the run takes them again. Of several processes only one has its log
        `enabled`; that of the others does nothing.
        """
        self._run_dir, self._enabled = run_dir, enabled
        if not enabled:
            return
        path = run_dir / "metrics.jsonl"
        with self._disk(), contextlib.ExitStack() as opened:
            forget_after(path, first_step)
            self._lines = opened.enter_context(path.open("ab"))
            self._board = EventFile(run_dir / "tensorboard", first_step)
            opened.callback(self._board.close)
            self._board.flush()
            self._files = opened.pop_all()
        self._progress = open_progress(first_step, steps)

    def advance(self) -> None:
        """One step is done."""
        if self._enabled:
            self._progress.advance()

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """Log `values` as those of `step`."""
        if not self._enabled:
            return
        with self._disk():
            self._lines.write(_line(step, values))
            self._lines.flush()
            self._board.write_scalars(step, values)
            self._board.flush()
        self._progress.show(step, values)

    def write_text(self, step: int, name: str, markdown: str) -> None:
        """Show `markdown` in TensorBoard's Text tab under `name` (`event_file.code_block` quotes text as it is)."""
        if not self._enabled:
            return
        with self._disk():
            self._board.write_text(step, name, markdown)
            self._board.flush()

    def __enter__(self) -> "MetricsLog":
        """The log itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files; an error on the way out does not take the place of one that is already under way."""
        if not self._enabled:
            return
        self._progress.close()
        with self._disk() if error is None else contextlib.suppress(OSError):
            self._files.close()

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            fail(
                f"run_dir {self._run_dir} cannot be written ({error.strerror or error})",
                "Make room or mend its permissions, then give the same command: the run goes on from its checkpoint",
            )


def forget_after(path: Path, step: int) -> None:
    """Drop from a `metrics.jsonl` the lines of steps after `step`, and those that are not whole.

    A run that was cut off leaves them behind. The file is replaced in one move, so that being cut off here loses
    nothing. Raises `OSError`.
    """
    if not path.exists():
        return
    before = path.read_bytes()
    after = b"".join(line for line in before.splitlines(keepends=True) if _is_kept(line, step))
    if after != before:
        replace_bytes(path, after)


def _is_kept(line: bytes, step: int) -> bool:
    try:
        fields = json.loads(line)
    except ValueError:
        return False
    return line.endswith(b"\n") and isinstance(fields, dict) and _is_up_to(fields.get("step"), step)


def _is_up_to(found: object, step: int) -> bool:
    return isinstance(found, int) and found <= step


def _line(step: int, values: Mapping[str, float | int]) -> bytes:
    numbers = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return json.dumps({"step": step, **numbers}, allow_nan=False).encode() + b"\n"
