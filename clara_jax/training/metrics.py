"""Where a run's numbers go: `metrics.jsonl`, TensorBoard and the terminal."""

import json
import sys
from pathlib import Path
from types import TracebackType

from tensorboard.summary import Writer
from tqdm import tqdm


class MetricsLog:
    """Writes one line of metrics at a time to all three places."""

    def __init__(self, run_dir: Path, first_step: int, steps: int):
        """Open the files of `run_dir`; the progress bar starts at `first_step`."""
        path = run_dir / "metrics.jsonl"
        _forget_after(path, first_step)
        self._lines = path.open("a", encoding="utf-8")
        self._board = Writer(str(run_dir / "tensorboard"))
        self._bar = tqdm(total=steps, initial=first_step, unit="step", file=sys.stderr, dynamic_ncols=True)

    def advance(self) -> None:
        """One step is done."""
        self._bar.update()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log `values` as those of `step`."""
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step=step)
        shown = {
            "loss": f"{values['loss']:.4f}",
            "lr": f"{values['learning_rate']:.1e}",
            "tok/s": f"{values['target_tokens_per_second']:.0f}",
        }
        self._bar.set_postfix(shown)

    def __enter__(self) -> "MetricsLog":
        """The log itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files."""
        self._bar.close()
        self._board.close()
        self._lines.close()


def _forget_after(path: Path, step: int) -> None:
    """Drop the lines of steps that a run which goes on from `step` will take again, and a half-written last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            kept.append(line)
    path.write_text("".join(kept), encoding="utf-8")
