"""One optimizer step, jitted."""

from collections.abc import Callable

import jax
import optax

from clara_jax.data.collate import Batch
from clara_jax.models.roles import Params
from clara_jax.training.objectives import Metrics, Objective
from clara_jax.training.state import TrainState

Step = Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]


def make_step(objective: Objective, optimizer: optax.GradientTransformation) -> Step:
    """`(state, frozen, batch) -> (state, metrics)`; the state's memory is reused.

    Dropout of step n is drawn from the run's key folded with n, so that it does not depend on where a run
    was interrupted.
    """

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(state.rng, state.step)
        value_and_grad = jax.value_and_grad(objective, has_aux=True)
        (_, metrics), gradients = value_and_grad(state.trainable, frozen, batch, rng)
        updates, moments = optimizer.update(gradients, state.optimizer, state.trainable)
        scalars = {name: value for name, value in metrics.items() if value.ndim == 0}
        scalars["gradient_norm"] = optax.tree.norm(gradients)
        trainable = optax.apply_updates(state.trainable, updates)
        return TrainState(state.step + 1, trainable, moments, state.rng), scalars

    return jax.jit(step, donate_argnums=0)
