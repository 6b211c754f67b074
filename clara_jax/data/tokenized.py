"""Tokenised samples on disk: one Arrow file, read through a memory map, one row per sample.

Lengths and counts are columns of their own, so that batches can be planned without reading a token.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Int, Int32

from clara_jax.data.samples import Exchange, Sample

# What decides the shape of a batch: documents, columns of the longest one, of the prompt with its answer, of the
# answer, of the question. Documents and questions count with layout and memory tokens, as the model reads them.
LENGTHS = ("candidates", "document", "prompt", "targets", "question")
# What is counted in a sample: tokens of its documents (as above), of its answer, of everything; texts cut.
TOTALS = ("document_tokens", "target_tokens", "real_tokens", "cut")
_TOKENS = pa.list_(pa.int32())
_SCHEMA = pa.schema(
    [
        pa.field("documents", pa.list_(_TOKENS)),
        pa.field("tokens", _TOKENS),
        pa.field("prompt_length", pa.int32()),
        pa.field("slots", pa.int32()),
        pa.field("question_tokens", _TOKENS),
        pa.field("positives", _TOKENS),
        pa.field("answers", pa.list_(pa.string())),
        *[pa.field(name, pa.int32()) for name in (*LENGTHS, *TOTALS)],
    ]
)
_SAMPLE_COLUMNS = ("documents", "tokens", "prompt_length", "slots", "question_tokens", "positives", "answers", "cut")
# Every record batch of the file but the last holds so many rows: a row is found by division.
ROWS = 256


def write_samples(path: Path, samples: Iterable[Sample], num_memory: int) -> int:
    """Write `samples` one batch of rows at a time and return how many there were. Raises `OSError`."""
    count = 0
    with path.open("wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        rows = []
        for sample in samples:
            rows.append(_row(sample, num_memory))
            count += 1
            if len(rows) == ROWS:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, _SCHEMA))
                rows = []
        if rows:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, _SCHEMA))
    return count


def _row(sample: Sample, num_memory: int) -> dict[str, object]:
    documents = [len(ids) + num_memory for ids in sample.documents]
    question = 0 if sample.question is None else len(sample.question) + num_memory
    prompt = len(sample.exchange.tokens)
    targets = prompt - sample.exchange.prompt_length
    lengths = (len(documents), max(documents, default=0), prompt, targets, question)
    totals = (sum(documents), targets, sum(documents) + prompt + question, sample.cut)
    return {
        "documents": sample.documents,
        "tokens": sample.exchange.tokens,
        "prompt_length": sample.exchange.prompt_length,
        "slots": sample.slots,
        "question_tokens": sample.question,
        "positives": sample.positives,
        "answers": sample.answers,
        **dict(zip(LENGTHS, lengths, strict=True)),
        **dict(zip(TOTALS, totals, strict=True)),
    }


@dataclasses.dataclass(frozen=True)
class TokenizedDataset:
    """The samples of one source. Reading is safe from several threads; a pickle holds the path alone.

    `key` names the cached folder and what it was made from, `checksum` what is in it; `skipped` records could not
    be used, the first of them for `reason`.
    """

    path: Path
    key: str
    checksum: str
    size: int
    skipped: int = 0
    reason: str | None = None

    def __len__(self) -> int:
        return self.size

    def __getstate__(self) -> dict[str, object]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def sample(self, index: int) -> Sample:
        """Sample number `index`, in the order of the source. Raises `IndexError`."""
        if not 0 <= index < self.size:
            raise IndexError(f"sample {index} of {self.size}")
        batch = self._batches[index // ROWS]
        row = {name: batch.column(name)[index % ROWS].as_py() for name in _SAMPLE_COLUMNS}
        return Sample(
            documents=row["documents"],
            exchange=Exchange(row["tokens"], row["prompt_length"]),
            slots=row["slots"],
            question=row["question_tokens"],
            positives=None if row["positives"] is None else tuple(row["positives"]),
            cut=row["cut"],
            answers=tuple(row["answers"]),
        )

    def documents(self) -> Iterator[list[Int32[np.ndarray, " tokens"]]]:
        """The token lists of each sample's documents, sample by sample."""
        for batch in self._batches:
            of_samples = batch.column("documents")
            of_documents = of_samples.values
            tokens, starts = of_documents.values.to_numpy(), of_documents.offsets.to_numpy()
            outer = of_samples.offsets.to_numpy()
            for first, end in itertools.pairwise(outer.tolist()):
                yield [tokens[starts[i] : starts[i + 1]] for i in range(first, end)]

    @functools.cached_property
    def lengths(self) -> Int[np.ndarray, "samples 5"]:
        """Each sample's `LENGTHS`."""
        return self._table(LENGTHS)

    @functools.cached_property
    def totals(self) -> Int[np.ndarray, "samples 4"]:
        """Each sample's `TOTALS`."""
        return self._table(TOTALS)

    @functools.cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        # The batches keep the memory map alive, and read from it where they are looked at.
        reader = pa.ipc.open_file(pa.memory_map(str(self.path)))
        return [reader.get_batch(i) for i in range(reader.num_record_batches)]

    def _table(self, names: tuple[str, ...]) -> Int[np.ndarray, "samples dims"]:
        columns = [np.concatenate([batch.column(name).to_numpy() for batch in self._batches]) for name in names]
        return np.stack(columns, axis=1)
