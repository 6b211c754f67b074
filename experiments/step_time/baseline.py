"""A training step as the PyTorch reference takes it: one transformers model, PEFT's adapters switched for each role.

As in the reference: every document is padded on the left to 256 + 3 tokens, every question to 1,024 + 3 (memory tokens
come on top), prompts to the longest of the batch; the compressor and the query reasoner run the whole causal language
model, its head included, and take the hidden states; the generator makes logits at all columns, in float32; candidates
are compressed in every step, without gradient, by the same adapter with its dropout; in `compression_pretraining` the
whole embedding table is a parameter of AdamW, with the gradient of all but the memory tokens' rows set to zero; nothing
is computed twice (no gradient checkpointing). `lean` is what a careful user of the same libraries would write: texts
padded to the longest of the batch, and no head where only hidden states are wanted.

Departures in the baseline's favour: no DeepSpeed around the step; the fused AdamW; the slots filled by one indexed
write, not row by row; only parameters that get a gradient are in the optimizer; tokens lie on the device before the
clock starts (on both sides); in bfloat16 adapters and moments are bfloat16, without float32 masters (this project's
are float32). To its harm, on CUDA only: attention is PyTorch's own (`sdpa`), where the reference can use
FlashAttention. Losses are read from the device after every step, on both sides.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from torch import Tensor
from torch.nn import functional

from clara_jax.data.collate import memory_columns
from clara_jax.data.samples import Sample
from clara_jax.data.tokenizer import LAYOUT_TOKENS, SpecialTokens
from clara_jax.interop.clara_checkpoint import ADAPTERS, REFERENCE_NAMES
from clara_jax.models.roles import Role
from clara_jax.training.stages import STAGES, StageName
from experiments.compression.models import DOC_MAX_LENGTH
from experiments.step_time.models import LORA, TOP_K, Made

QUESTION_MAX_LENGTH = 1024
MSE_WEIGHT, TEMPERATURE, LEARNING_RATE = 0.1, 0.02, 1e-4
_IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Texts:
    """Rows padded on the left, and which columns are real."""

    ids: Tensor
    mask: Tensor


@dataclasses.dataclass(frozen=True)
class TorchBatch:
    """One batch on the device; `slots` are the columns of all memory tokens of each prompt."""

    documents: Texts
    prompts: Texts
    labels: Tensor
    slots: Tensor
    questions: Texts | None

    @property
    def columns(self) -> int:
        """Columns that a step computes."""
        texts = [self.documents, self.prompts, *([self.questions] if self.questions else [])]
        return sum(text.ids.numel() for text in texts)


def make_batch(samples: Sequence[Sample], special: SpecialTokens, device: str, lean: bool) -> TorchBatch:
    """The samples as the reference pads them, or (`lean`) to the longest of each sort."""
    documents = [document for sample in samples for document in sample.documents]
    questions = [sample.question for sample in samples if sample.question is not None]
    prompts = _pad([sample.exchange.tokens for sample in samples], special.pad, None)
    labels = torch.full_like(prompts.ids, _IGNORED)
    width, slots = prompts.ids.shape[1], []
    for row, sample in enumerate(samples):
        tokens, answer = sample.exchange.tokens, sample.exchange.prompt_length
        labels[row, width - len(tokens) + answer :] = torch.tensor(tokens[answer:])
        slots.append(width - len(tokens) + torch.from_numpy(memory_columns(tokens, sample.slots, special)).flatten())
    batch = TorchBatch(
        documents=_encoder_texts(documents, special, None if lean else DOC_MAX_LENGTH),
        prompts=prompts,
        labels=labels,
        slots=torch.stack(slots),
        questions=_encoder_texts(questions, special, None if lean else QUESTION_MAX_LENGTH) if questions else None,
    )
    return _on(batch, device)


def add_adapters(made: Made, special: SpecialTokens) -> Any:
    """The base with an adapter for each role; where the embedding table is trained, only its memory tokens are."""
    base: Any = made.torch_base.requires_grad_(False)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=LORA.rank,
        lora_alpha=round(LORA.alpha),
        lora_dropout=LORA.dropout,
        target_modules="all-linear",
    )
    model: Any = None
    for role in REFERENCE_NAMES:
        if model is None:
            model = PeftModel(base, config, role, autocast_adapter_dtype=False)
        else:
            model.add_adapter(role, config, autocast_adapter_dtype=False)
    model.to(base.dtype)
    table = base.get_input_embeddings().weight.requires_grad_(True)
    rows = torch.zeros(len(table), 1, dtype=table.dtype, device=table.device)
    rows[special.memory_ids] = 1
    table.register_hook(lambda gradient: gradient * rows)
    return model


def load_checkpoint(model: Any, made: Made) -> None:
    """The checkpoint's adapters and embedding table into a model of `add_adapters`, whatever it has learned since."""
    content = torch.load(made.checkpoint / ADAPTERS, weights_only=True)
    for role, name in REFERENCE_NAMES.items():
        set_peft_model_state_dict(model, {f"base_model.model.{key}": x for key, x in content[name].items()}, role)
    with torch.no_grad():
        model.get_base_model().get_input_embeddings().weight.copy_(made.table)


class Baseline:
    """The stage's step on a model of `add_adapters`, with an optimizer of its own."""

    def __init__(self, model: Any, stage: StageName, num_memory: int, lean: bool):
        self.model, self.num_memory, self.lean = model, num_memory, lean
        self.base = model.get_base_model()
        self.end_to_end = stage == "end_to_end"
        marks = tuple(f".{name}." for name in STAGES[stage].trains)
        table = self.base.get_input_embeddings().weight.requires_grad_("memory_tokens" in STAGES[stage].trains)
        self.trained = [p for name, p in model.named_parameters() if any(mark in name for mark in marks)]
        self.trained += [table] if table.requires_grad else []
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True
        )

    def step(self, batch: TorchBatch) -> float:
        """Take one step with dropout; the loss before it."""
        self.model.train()
        loss, _ = self._gradients(batch)
        self.optimizer.step()
        return loss.item()

    def loss_and_gradient_norm(self, batch: TorchBatch) -> tuple[float, float]:
        """Both without dropout; no step is taken."""
        self.model.eval()
        loss, norm = self._gradients(batch)
        return loss.item(), norm.item()

    def _gradients(self, batch: TorchBatch) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._end_to_end(batch) if self.end_to_end else self._compression(batch)
        loss.backward()
        return loss.detach(), torch.nn.utils.clip_grad_norm_(self.trained, 1.0)

    def _compression(self, batch: TorchBatch) -> Tensor:
        memories, hidden = self._read("compressor", batch.documents)
        is_text = batch.documents.mask[:, :, None].to(hidden.dtype).clone()
        is_text[:, -self.num_memory :] = 0
        text_mean = (hidden * is_text).sum(1) / is_text.sum(1)
        mse = functional.mse_loss(text_mean, memories.mean(1))
        return self._answer_loss(batch, memories) + MSE_WEIGHT * mse

    def _end_to_end(self, batch: TorchBatch) -> Tensor:
        assert batch.questions is not None
        with torch.no_grad():
            memories, _ = self._read("compressor", batch.documents)
        queries = self._read("query_reasoner", batch.questions)[0].flatten(1)
        documents = memories.reshape(len(queries), -1, queries.shape[1])
        scores = functional.cosine_similarity(queries[:, None].float(), documents.float(), dim=-1)
        weights = straight_through_top_k(scores, TOP_K, TEMPERATURE).to(documents.dtype)
        return self._answer_loss(batch, weights @ documents)

    def _read(self, role: Role, texts: Texts) -> tuple[Tensor, Tensor]:
        """Hidden states at the memory tokens, and at all columns."""
        self._activate(role)
        inputs = {"input_ids": texts.ids, "attention_mask": texts.mask, "use_cache": False}
        if self.lean:
            hidden = self.base.model(**inputs).last_hidden_state
        else:
            hidden = self.model(**inputs, output_hidden_states=True).hidden_states[-1]
        return hidden[:, -self.num_memory :], hidden

    def _answer_loss(self, batch: TorchBatch, memories: Tensor) -> Tensor:
        embeddings = self.base.get_input_embeddings()(batch.prompts.ids)
        rows = torch.arange(len(embeddings), device=embeddings.device)[:, None]
        values = memories.reshape(len(embeddings), -1, embeddings.shape[-1])
        embeddings = embeddings.index_put((rows, batch.slots), values)
        self._activate("generator")
        logits = self.model(inputs_embeds=embeddings, attention_mask=batch.prompts.mask, use_cache=False).logits
        flat = logits[:, :-1].float().flatten(0, 1)
        return functional.cross_entropy(flat, batch.labels[:, 1:].flatten(), ignore_index=_IGNORED)

    def _activate(self, role: Role) -> None:
        self.model.set_adapter(role)
        for parameter in self.trained:  # PEFT freezes the others
            parameter.requires_grad_(True)


def straight_through_top_k(scores: Tensor, k: int, temperature: float) -> Tensor:
    """[batch, k, candidates], one-hot in value and soft in gradient; earlier slots' picks are lowered by log(1e-8)."""
    logits = scores / temperature
    hard = functional.one_hot(logits.topk(k, dim=-1).indices, logits.shape[-1]).to(logits.dtype)
    free = torch.ones_like(logits)
    soft = []
    for slot in range(k):
        soft.append(torch.softmax(logits + torch.log(free + 1e-8), dim=-1))
        free = free * (1 - hard[:, slot])
    weights = torch.stack(soft, dim=1)
    return hard + (weights - weights.detach())


def _encoder_texts(passages: list[list[int]], special: SpecialTokens, limit: int | None) -> Texts:
    texts = _pad(passages, special.pad, limit and limit + LAYOUT_TOKENS)
    memory = torch.tensor(special.memory_ids).expand(len(passages), -1)
    return Texts(torch.cat([texts.ids, memory], 1), torch.cat([texts.mask, torch.ones_like(memory)], 1))


def _pad(rows: list[list[int]], pad: int, width: int | None) -> Texts:
    width = width or max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return Texts(ids, mask)


def _on(value: Any, device: str) -> Any:
    """A dataclass with all of its tensors on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if not dataclasses.is_dataclass(value):
        return value
    moved = {field.name: _on(getattr(value, field.name), device) for field in dataclasses.fields(value)}
    return dataclasses.replace(value, **moved)  # type: ignore[type-var]
