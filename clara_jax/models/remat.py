"""What the backward pass of a layer keeps from the forward pass; what it does not keep is computed again.

    everything  all that the backward pass reads; nothing is computed again
    lora        the results of the frozen products and of attention, and the narrow side of every adapter: what the
                backward pass of a frozen layer with adapters reads and cannot make again without a wide product
    dots        every product with weights, the wide side of the adapters too
    offload     as lora, moved to the host's memory in the meantime
    nothing     the layer's input alone

A frozen weight gets no gradient, so its input is kept only where an adapter reads it, and that is a normalised or
multiplied copy of what `lora` keeps.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

RematPolicy = Literal["everything", "lora", "dots", "offload", "nothing"]
NAME = "clara_jax.kept"


def keep(x: Array) -> Array:
    """`x`, marked as what the policies `lora` and `offload` keep."""
    return checkpoint_name(x, NAME)


def remat_policy(name: RematPolicy) -> Callable[..., Any] | None:
    """The policy for `jax.checkpoint`; None where nothing is computed again."""
    policies = jax.checkpoint_policies
    named = policies.save_only_these_names(NAME)
    return {
        "everything": None,
        "lora": policies.save_from_both_policies(named, _is_fused_attention),
        "dots": policies.dots_with_no_batch_dims_saveable,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[NAME],
            offload_src="device",
            offload_dst="pinned_host",
        ),
        "nothing": policies.nothing_saveable,
    }[name]


def _is_fused_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    """The forward kernel of cuDNN, whose second result, which its backward kernel reads, has no name."""
    return primitive.name.startswith("dot_product_attention_fwd")
