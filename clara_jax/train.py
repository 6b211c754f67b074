"""`python -m clara_jax.train --config FILE [--key VALUE ...]`: train a stage, or a curriculum of them."""

import sys
from pathlib import Path

from clara_jax import STARTED
from clara_jax.clara import Clara
from clara_jax.cluster import is_main, joined, meet
from clara_jax.config import TrainConfig
from clara_jax.curriculum import parse_curriculum
from clara_jax.errors import run_command
from clara_jax.evaluation.at_end import RESULTS, evaluate_at_end
from clara_jax.evaluation.task import prepare_evaluation
from clara_jax.training.loop import Outcome, train
from clara_jax.training.setup import check
from clara_jax.training.stop import STOPPED_STATUS


def main() -> None:
    """Parse, train, evaluate if that is asked for, and say where the results are."""
    curriculum = parse_curriculum()
    runs, results = curriculum.runs, Path(curriculum.run_dir) / RESULTS
    with joined(runs[0].cluster):
        for config in runs:
            check(config)
        evaluation = None if curriculum.evaluation is None else prepare_evaluation(curriculum.evaluation)
        for config in runs:
            outcome = train(config)
            _say(_summary(outcome, config))
            if is_main() and evaluation is not None and outcome.loss is not None:
                results.unlink(missing_ok=True)  # of an earlier model
            if not outcome.finished:
                sys.exit(STOPPED_STATUS)
        if evaluation is not None:
            meet("results of an earlier model removed")
            if results.exists():
                _say(f"Results: {results} is there already; remove it to evaluate again.")
            else:
                clara = Clara.from_pretrained(runs[-1].run_dir)  # in all processes: Orbax waits for every one
                if is_main():
                    run_dir = Path(curriculum.run_dir)
                    print("\n" + evaluate_at_end(clara, evaluation, run_dir, runs[-1].run_dir, STARTED), flush=True)
                meet("evaluated")
        _say(f"Curves: tensorboard --logdir {curriculum.run_dir}")


def _say(line: str) -> None:
    if is_main():
        print(line, flush=True)


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


if __name__ == "__main__":
    run_command(main)
