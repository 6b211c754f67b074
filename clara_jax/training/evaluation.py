"""Validation during training: the stage's loss, recall and precision of retrieval, and generated answers scored."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from clara_jax.data.collate import Batch, pad_exchanges
from clara_jax.data.order import FileOrder
from clara_jax.data.pipeline import Batches
from clara_jax.data.samples import Exchange
from clara_jax.generation import generate
from clara_jax.models.roles import GeneratorInputs, Params
from clara_jax.models.top_k import select_top_k
from clara_jax.pretrained import Pretrained
from clara_jax.scoring.answers import score_answers
from clara_jax.scoring.retrieval_sums import retrieval_means
from clara_jax.sharding import on_mesh, place, place_batch, replicated
from clara_jax.training.objectives import Counts, Objective, candidate_memories, candidate_scores
from clara_jax.training.step import make_evaluation


@dataclasses.dataclass(frozen=True)
class Answered:
    """One prompt of the validation data, what the model answered, and what it could have."""

    prompt: str
    generated: str
    accepted: tuple[str, ...]


class Evaluation:
    """Evaluates a model on `batches` (`sequential_batches` of the validation data)."""

    def __init__(
        self,
        model: Pretrained,
        objective: Objective,
        batches: Batches,
        mesh: Mesh,
        top_k: int,
        answers: int,
        max_new_tokens: int,
    ):
        """Prepare; `answers` records get an answer of at most `max_new_tokens`, from their `top_k` best memories."""
        self._batches, self._mesh, self._tokenizer = batches, mesh, model.tokenizer
        assert isinstance(batches.order, FileOrder)
        self._samples = batches.order.samples
        self._answers = min(answers, self._samples)
        self._evaluate = make_evaluation(objective, mesh)
        self._answer = _make_answering(model, mesh, batches.data.recipe.kind == "retrieval", top_k, max_new_tokens)

    def __call__(self, trainable: Params, frozen: Params) -> tuple[dict[str, float], list[Answered]]:
        """Metrics of the whole validation data, named `evaluation/...`, and the answers."""
        sums: dict[str, Any] = {}
        answered: list[Answered] = []
        for counted in self._batches.iterate():
            batch = place_batch(self._mesh, counted.batch, len(counted.samples))
            found = jax.tree.map(float, self._evaluate(trainable, frozen, batch, self._totals))
            sums = jax.tree.map(operator.add, sums, found) if sums else found
            if len(answered) < self._answers:
                answered += self._generate({**frozen, **trainable}, batch, counted.samples)
        answered = answered[: self._answers]
        retrieval = sums.pop("retrieval", None)
        values = sums | ({} if retrieval is None else retrieval_means(retrieval))
        values |= score_answers([a.generated for a in answered], [a.accepted for a in answered])
        return {f"evaluation/{name}": value for name, value in values.items()}, answered

    def _generate(self, params: Params, batch: Batch, numbers: Int[np.ndarray, " batch"]) -> list[Answered]:
        prompts = place_batch(self._mesh, self._prompts(numbers), len(numbers))
        tokens = np.asarray(self._answer(params, batch, prompts))
        answered = []
        for number, row in zip(numbers, tokens, strict=True):
            if number >= 0:
                sample = self._batches.data.sample(int(number))
                prompt = self._tokenizer.decode(sample.exchange.tokens[: sample.exchange.prompt_length])
                answered.append(Answered(prompt, self._tokenizer.decode(row.tolist()), sample.answers))
        return answered

    def _prompts(self, numbers: Int[np.ndarray, " batch"]) -> GeneratorInputs:
        """The prompts of this process's rows without answers, padded on the left to one length."""
        data = self._batches.data
        exchanges, slots = [], []
        for row in self._batches.rows:
            sample = data.sample(max(0, int(numbers[row])))  # of a masked row nobody reads the answer
            exchange = sample.exchange
            exchanges.append(Exchange(exchange.tokens[: exchange.prompt_length], exchange.prompt_length))
            slots.append(sample.slots)
        shape = self._batches.shapes[-1]
        return pad_exchanges(exchanges, slots, data.special, shape.prompt, 1, "left", at_least=shape.slots)

    @functools.cached_property
    def _totals(self) -> Counts:
        """What the means over the whole validation data divide by."""
        data, number = self._batches.data, self._samples
        positives = sum(bool(data.sample(i).positives) for i in range(number))
        sums = (data.totals[:number, 1].sum(), data.lengths[:number, 0].sum(), positives)
        return Counts(*(place(np.asarray(count, np.float32), replicated(self._mesh)) for count in sums))


def describe(answered: Sequence[Answered]) -> str:
    """The answers as a Markdown table."""
    rows = ["| prompt | generated | accepted |", "|---|---|---|"]
    for one in answered:
        cells = (one.prompt, one.generated, " / ".join(one.accepted))
        rows.append("| " + " | ".join(" ".join(cell.replace("|", r"\|").split()) for cell in cells) + " |")
    return "\n".join(rows)


def _make_answering(
    model: Pretrained, mesh: Mesh, retrieves: bool, top_k: int, max_new_tokens: int
) -> Callable[[Params, Batch, GeneratorInputs], Array]:
    roles = model.model

    def answer(params: Params, batch: Batch, prompts: GeneratorInputs) -> Array:
        memories = candidate_memories(roles, params, batch)
        if retrieves:
            scores = candidate_scores(roles, params, batch, memories)
            memories, _ = select_top_k(scores, memories, top_k)
        return generate(
            roles,
            params,
            prompts,
            memories,
            max_new_tokens=max_new_tokens,
            stop_ids=model.stop_ids,
            pad_id=model.tokenizer.special.pad,
        )

    return jax.jit(on_mesh(mesh, answer), out_shardings=replicated(mesh))
