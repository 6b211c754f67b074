"""One recorded case: a tiny model, its checkpoints, and the reference's numbers for each stage."""

import dataclasses
import functools
import json
import random
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clara_jax.clara import Clara
from clara_jax.data.collate import (
    Batch,
    Exchange,
    Side,
    pad_candidates,
    pad_encoder_inputs,
    pad_exchanges,
)
from clara_jax.data.records import Record
from clara_jax.data.samples import Limits, Sample, compression_sample, instruction_sample, retrieval_sample
from clara_jax.interop.adapters import adapter_to_tensors
from clara_jax.interop.clara_checkpoint import REFERENCE_NAMES

STAGE_1 = ("stage1_qa", "stage1_paraphrase", "stage1_mixed", "stage1_qa_truncated")
STAGE_FILES = (*STAGE_1, "stage1_2", "stage2", "stage2_pretrain_retrieval")


@functools.cache
def load_clara(checkpoint: Path, dtype: str = "float32") -> Clara:
    """The checkpoint, computing in `dtype`."""
    return Clara.from_pretrained(checkpoint, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class StageCase:
    """One stage file of one case."""

    folder: Path
    stage: str

    @functools.cached_property
    def texts(self) -> dict[str, Any]:
        return json.loads((self.folder / f"{self.stage}.json").read_text(encoding="utf-8"))

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.folder / f"{self.stage}.npz") as file:
            return {name: file[name] for name in file.files}

    @property
    def checkpoint(self) -> Path:
        return self.folder.parent / self.texts["checkpoint"]

    @property
    def clara(self) -> Clara:
        return load_clara(self.checkpoint)

    @functools.cached_property
    def records(self) -> list[Record]:
        records = []
        known = self.texts.get("pos_index") or [item.get("pos_index") for item in self.texts["items"]]
        for item, positives in zip(self.texts["items"], known, strict=True):
            listed = isinstance(item["question"], list) and item["data_type"] == "qa"
            questions = item["question"] if isinstance(item["question"], list) else [item["question"]]
            answers = item["answer"] if isinstance(item["answer"], list) else [item["answer"]]
            texts = tuple(item["docs"]), tuple(questions), tuple(answers)
            records.append(Record(*texts, item["data_type"], listed, tuple(positives or ())))
        return records

    @functools.cached_property
    def samples(self) -> list[Sample]:
        tokenizer = self.clara.tokenizer
        limits = Limits(self.clara.doc_max_length, self.texts["dec_max_len"], self.texts["dec_max_len"])
        rng = random.Random(self.texts["random_seed"])
        if self.stage.startswith("stage1_2"):
            return [instruction_sample(r, tokenizer, limits, rng) for r in self.records]
        if self.stage.startswith("stage2"):
            k = self.texts["generation_top_k"]
            return [retrieval_sample(r, tokenizer, limits, k) for r in self.records]
        return [compression_sample(r, tokenizer, limits, rng) for r in self.records]

    def batch(self, side: Side) -> Batch:
        """The samples padded as the reference does (left) or as this project does (right).

        The files of stage 1 share their shapes, so that they compile once: three rows, of which the last may
        be empty, and the length limit.
        """
        limit, rows = self.texts["dec_max_len"], len(self.samples)
        longest = max(len(s.exchange.tokens) for s in self.samples)
        if self.stage in STAGE_1:
            return self._padded(side, max(3, rows), max(limit, 384), max(320, longest))
        return self._padded(side, rows, longest, longest)

    def reference_batch(self) -> Batch:
        """The samples in the reference's own layout and shapes."""
        longest = max(len(s.exchange.tokens) for s in self.samples)
        return self._padded("left", len(self.samples), longest, longest)

    def _padded(self, side: Side, rows: int, length: int, targets: int) -> Batch:
        special = self.clara.tokenizer.special
        missing = rows - len(self.samples)
        document_length = self.clara.doc_max_length + 3 + special.num_memory
        documents, exists = pad_candidates(
            [s.documents for s in self.samples] + [[]] * missing, special, document_length, side
        )
        exchanges = [s.exchange for s in self.samples] + [Exchange([special.pad], 1)] * missing
        slots = [s.slots for s in self.samples] + [0] * missing
        prompts = pad_exchanges(exchanges, slots, special, length, targets, side)
        questions = positives = None
        if self.samples[0].question is not None:
            rows = [s.question or [] for s in self.samples]
            length = self.texts["dec_max_len"] + 3 + special.num_memory
            questions = pad_encoder_inputs(rows, special, length, side)
            positives = np.zeros(exists.shape, bool)
            for row, sample in enumerate(self.samples):
                positives[row, list(sample.positives or ())] = True
        return Batch(documents, exists, prompts, questions, positives)


def named_gradients(case: StageCase, gradients: dict[str, Any]) -> dict[str, np.ndarray]:
    """`grad::<adapter>::<parameter>` -> gradient, in the reference's orientation."""
    named = {}
    for role, reference in REFERENCE_NAMES.items():
        if role in gradients:
            tensors = adapter_to_tensors(gradients[role], case.clara.model.decoder.config)
            named.update({f"{reference}::{name}": tensor for name, tensor in tensors.items()})
    return named


def relative_norm(got: np.ndarray, expected: np.ndarray) -> float:
    """||got - expected|| / ||expected||, or ||got|| where expected is zero."""
    scale = float(np.linalg.norm(expected)) or 1.0
    return float(np.linalg.norm(np.asarray(got, np.float64) - expected)) / scale


def worst_entry(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest error as a share of the largest entry."""
    return float(np.max(np.abs(np.asarray(got) - expected)) / np.max(np.abs(expected)))


def to_host(tree: Any) -> Any:
    """The tree as NumPy arrays."""
    return jax.tree.map(np.asarray, tree)
