"""The recorded top-k gradients and learning rates."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from clara_jax.models.top_k import select_top_k
from clara_jax.training.optimizer import OptimizerConfig, make_schedule


def test_top_k_selection_and_gradient(recorded):
    with np.load(recorded("topk.npz")) as file:
        arrays = {name: file[name] for name in file.files}
    cases = [name.removesuffix("::idx") for name in arrays if name.endswith("::idx") and "::k" in name]
    assert cases
    for name in cases:
        spread, k, temperature = name.split("::")
        logits, cotangent = arrays[f"{spread}::logits"], arrays[f"{spread}::{k}::cotangent"]
        candidates = logits.shape[1]
        # With unit vectors as memories the selected memories are the selection matrix W itself.
        unit = jnp.broadcast_to(jnp.eye(candidates)[None, :, None, :], (len(logits), candidates, 1, candidates))

        def weighted(scores, unit=unit, k=k, temperature=temperature, cotangent=cotangent):
            selected, indices = select_top_k(scores, unit, int(k[1:]), float(temperature[1:]))
            return jnp.sum(selected[:, :, 0] * cotangent), (selected, indices)

        gradient, (selected, indices) = jax.grad(weighted, has_aux=True)(jnp.asarray(logits))
        np.testing.assert_array_equal(indices, arrays[f"{name}::idx"])
        np.testing.assert_allclose(selected[:, :, 0], arrays[f"{name}::W"], atol=1.2e-7)  # hard + soft - soft
        scale = np.abs(arrays[f"{name}::dlogits"]).max()
        np.testing.assert_allclose(gradient, arrays[f"{name}::dlogits"], atol=2e-6 * max(scale, 1.0))


def test_learning_rates(recorded):
    for entry in json.loads(recorded("lr_schedule.json").read_text(encoding="utf-8")):
        config = OptimizerConfig(
            learning_rate=entry["lr"],
            schedule="constant" if entry["name"] == "constant" else "cosine",
            warmup_ratio=entry["warmup_ratio"],
        )
        schedule = make_schedule(config, entry["total_steps"])
        got = [float(schedule(step)) for step in range(entry["total_steps"])]
        np.testing.assert_allclose(got, entry["lr_used_at_step"], rtol=1e-5, atol=1e-12)  # float32 cosine
