"""`python -m clara_jax.train --config FILE [--key VALUE ...]`: train one stage."""

from clara_jax.config import parse_train_config
from clara_jax.errors import run_command
from clara_jax.training.loop import train


def main() -> None:
    """Parse, train, and say where the results are."""
    config = parse_train_config()
    loss = train(config)
    print(f"Last loss {loss:.4f}. Checkpoints and metrics are in {config.run_dir}.")
    print(f"Curves: tensorboard --logdir {config.run_dir}/tensorboard")


if __name__ == "__main__":
    run_command(main)
