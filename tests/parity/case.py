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
    Side,
    pad_candidates,
    pad_encoder_inputs,
    pad_exchanges,
)
from clara_jax.data.records import Record
from clara_jax.data.samples import Limits, Sample, compression_sample, instruction_sample, retrieval_sample
from clara_jax.interop.adapters import adapter_to_tensors
from clara_jax.interop.clara_checkpoint import REFERENCE_NAMES

STAGE_FILES = (
    "stage1_qa",
    "stage1_paraphrase",
    "stage1_mixed",
    "stage1_qa_truncated",
    "stage1_2",
    "stage2",
    "stage2_pretrain_retrieval",
)


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
        for item in self.texts["items"]:
            listed = isinstance(item["question"], list) and item["data_type"] == "qa"
            questions = item["question"] if isinstance(item["question"], list) else [item["question"]]
            answers = item["answer"] if isinstance(item["answer"], list) else [item["answer"]]
            positives = tuple(item.get("pos_index") or ())
            records.append(
                Record(tuple(item["docs"]), tuple(questions), tuple(answers), item["data_type"], listed, positives)
            )
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
        """The samples in the reference's shapes, padded as the reference does (left) or as this project does."""
        special = self.clara.tokenizer.special
        document_length = self.clara.doc_max_length + 3 + special.num_memory
        documents, exists = pad_candidates([s.documents for s in self.samples], special, document_length, side)
        longest = max(len(s.exchange.tokens) for s in self.samples)
        targets = max(len(s.exchange.tokens) - s.exchange.prompt_length for s in self.samples)
        prompts = pad_exchanges(
            [s.exchange for s in self.samples],
            [s.slots for s in self.samples],
            special,
            longest,
            targets,
            side,
        )
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
