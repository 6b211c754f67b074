"""What changes during training, in one place."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from clara_jax.models.roles import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Steps taken, the trained subtrees, the optimizer's moments, and the key that dropout is drawn from."""

    step: Int[Array, ""]
    trainable: Params
    optimizer: optax.OptState
    rng: PRNGKeyArray


def init_state(trainable: Params, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step."""
    # The step donates its state, and one array may not be donated twice or be shared with frozen parameters.
    own = jax.tree.map(jnp.array, trainable)
    return TrainState(jnp.zeros((), jnp.int32), own, optimizer.init(own), jax.random.key(seed))
