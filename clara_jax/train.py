"""`python -m clara_jax.train --config FILE [--key VALUE ...]`: train a stage, or a curriculum of them."""

import sys

from clara_jax.cluster import is_main, joined
from clara_jax.config import TrainConfig
from clara_jax.curriculum import parse_runs
from clara_jax.errors import run_command
from clara_jax.training.loop import Outcome, train
from clara_jax.training.setup import check
from clara_jax.training.stop import STOPPED_STATUS


def main() -> None:
    """Parse, train, and say where the results are."""
    runs = parse_runs()
    with joined(runs[0].cluster):
        for config in runs:
            check(config)
        for config in runs:
            outcome = train(config)
            if is_main():
                print(_summary(outcome, config), flush=True)
            if not outcome.finished:
                sys.exit(STOPPED_STATUS)
        if is_main():
            print(f"Curves: tensorboard --logdir {runs[0].run_dir if len(runs) == 1 else _parent(runs[0].run_dir)}")


def _summary(outcome: Outcome, config: TrainConfig) -> str:
    if outcome.loss is None:
        return f"{config.run_dir} has already taken its {outcome.steps} steps."
    if not outcome.finished:
        return (
            f"Stopped after step {outcome.step} of {outcome.steps}, loss {outcome.loss:.4f}, and saved. "
            "Give the same command to go on."
        )
    best = "" if outcome.best is None else f" The best {config.keep_best} is checkpoints/{outcome.best}."
    return f"Last loss {outcome.loss:.4f}. Checkpoints and metrics are in {config.run_dir}.{best}"


def _parent(run_dir: str) -> str:
    return run_dir.rpartition("/")[0]


if __name__ == "__main__":
    run_command(main)
