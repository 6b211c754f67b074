"""Model FLOPs of a training step, counted from shapes, and what devices can do: together, MFU.

Counted is what the model has to compute for its real tokens: a product of [a, b] and [b, c] is 2abc. Not counted are
padding, what a backward pass computes again to save memory, and what is small beside the products (norms, rotations,
softmax, the scores of candidates). With s the seconds of a step, model FLOPs utilisation (MFU) is

    step_flops(...) / (s * number of devices * peak_flops(device.device_kind))

where the lengths are those of all devices' rows together.
"""

import dataclasses

import numpy as np
from jaxtyping import Int

from clara_jax.data.collate import Batch
from clara_jax.models.config import DecoderConfig
from clara_jax.models.roles import Role
from clara_jax.training.stages import StageName


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Real tokens (memory tokens included) of every row that a step reads, by role; `targets` are answer tokens."""

    documents: Int[np.ndarray, " documents"]
    questions: Int[np.ndarray, " questions"]
    prompts: Int[np.ndarray, " prompts"]
    targets: int


def batch_lengths(batch: Batch) -> Lengths:
    """The lengths of a batch on the host."""
    nothing = np.zeros(0, int)
    documents = nothing
    if batch.documents is not None:
        documents = np.asarray(batch.documents.valid).sum(axis=-1)[np.asarray(batch.candidates)]
    return Lengths(
        documents=documents,
        questions=nothing if batch.questions is None else np.asarray(batch.questions.valid).sum(axis=-1),
        prompts=nothing if batch.prompts is None else np.asarray(batch.prompts.valid).sum(axis=-1),
        targets=0 if batch.prompts is None else int(np.asarray(batch.prompts.target_weights).sum()),
    )


def step_flops(
    config: DecoderConfig, rank: int, stage: StageName, trainable: tuple[str, ...], lengths: Lengths
) -> float:
    """FLOPs of one optimizer step of `stage` that trains the subtrees `trainable`, adapters being of `rank`.

    Whatever of `lengths` the stage does not read is not counted.
    """
    rows: dict[Role, Int[np.ndarray, " rows"]] = {"compressor": lengths.documents}
    if stage in ("end_to_end", "retrieval_pretraining"):
        rows["query_reasoner"] = lengths.questions
    if stage != "retrieval_pretraining":
        rows["generator"] = lengths.prompts
    backward = _roles_with_gradient(stage, trainable)
    total = sum(forward_flops(config, rank, of_role) for of_role in rows.values())
    for role, of_role in rows.items():
        if role in backward:
            total += backward_flops(config, rank, of_role, role in trainable)
    if "generator" in rows:
        # Forward, and backward to the hidden states; the head is frozen.
        total += 2 * vocabulary_flops(config, lengths.targets)
    return float(total)


def forward_flops(config: DecoderConfig, rank: int, lengths: Int[np.ndarray, " rows"]) -> float:
    """FLOPs of the layers' forward pass over rows of `lengths` real tokens; without the vocabulary projection."""
    base, adapter = _linear_flops(config, rank, lengths)
    return base + adapter + _attention_flops(config, lengths)


def backward_flops(
    config: DecoderConfig, rank: int, lengths: Int[np.ndarray, " rows"], trains_adapter: bool = True
) -> float:
    """FLOPs of the layers' backward pass, which leads through frozen weights to the inputs.

    A product costs one product per operand that needs a gradient: one for a frozen linear layer, two for attention
    and for a trained adapter.
    """
    base, adapter = _linear_flops(config, rank, lengths)
    return base + (2 if trains_adapter else 1) * adapter + 2 * _attention_flops(config, lengths)


def vocabulary_flops(config: DecoderConfig, tokens: int) -> float:
    """FLOPs of the logits at `tokens` tokens."""
    return 2.0 * config.hidden_size * config.vocab_size * tokens


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOPs per second of one device of jax's `device_kind`, None for an unknown one."""
    return PEAK_FLOPS.get(device_kind)


# By jax's `device_kind`, which for a GPU is the name that `nvidia-smi` shows. The makers' data sheets, without
# sparsity. One TPU v2, v3 or 7x chip is two devices in jax.
PEAK_FLOPS: dict[str, float] = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A10": 125e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA A30": 165e12,
    "NVIDIA A40": 149.7e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA RTX A6000": 154.8e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200 120GB": 989e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA GH200 144G HBM3e": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
}


def _roles_with_gradient(stage: StageName, trainable: tuple[str, ...]) -> set[Role]:
    """Roles that a gradient flows through, by the objectives' rules.

    Through a memory it reaches the compressor's adapter and the memory tokens that the compressor reads, except that
    end-to-end training stops it at the memories unless the compressor is trained, and retrieval pretraining always.
    """
    names = set(trainable)
    roles: set[Role] = set()
    if stage in ("end_to_end", "retrieval_pretraining") and names & {"query_reasoner", "memory_tokens"}:
        roles.add("query_reasoner")
    if stage != "retrieval_pretraining":
        roles.add("generator")
        if "compressor" in names or (stage != "end_to_end" and "memory_tokens" in names):
            roles.add("compressor")
    return roles


def _linear_flops(config: DecoderConfig, rank: int, lengths: Int[np.ndarray, " rows"]) -> tuple[float, float]:
    """Forward FLOPs of the frozen linear layers, and of their adapters."""
    sizes = config.projections
    base = sum(size_in * size_out for size_in, size_out in sizes.values())
    adapter = sum(
        rank * (sizes[targets[0]][0] + sum(sizes[name][1] for name in targets))
        for targets in config.adapter_sites.values()
    )
    products = 2.0 * config.num_layers * int(lengths.sum())
    return products * base, products * adapter


def _attention_flops(config: DecoderConfig, lengths: Int[np.ndarray, " rows"]) -> float:
    """Forward FLOPs of query key^T and of weights value, over the pairs that the causal mask leaves."""
    pairs = sum(_attended_pairs(lengths, window) for window in config.windows or (0,) * config.num_layers)
    return 2.0 * 2.0 * config.num_heads * config.head_dim * pairs


def _attended_pairs(lengths: Int[np.ndarray, " rows"], window: int) -> int:
    """Pairs of a token and one at or before it, at most `window` - 1 columns away (0: any)."""
    lengths = lengths.astype(np.int64)
    beyond = np.maximum(lengths - window, 0) if window else np.zeros_like(lengths)
    return int((lengths * (lengths + 1) // 2 - beyond * (beyond + 1) // 2).sum())
