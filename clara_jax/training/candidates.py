"""Memories of the candidates, computed once: training on retrieval with a frozen compressor need not read documents.

Every document of the data is known by its tokens. Its memory is looked up in the memory stores that the user names, and
in a store of this module's own beside the token cache; what neither has is compressed before the first step, and put
into the latter. That store is made segment by segment as `clara_jax.compress` makes them: a killed run goes on, and a
later run with the same compressor finds everything there. Memories are stored in the compute type, so they are the very
numbers that a step would compute, without the compressor's dropout.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import filelock
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Float, Int

from clara_jax.cluster import is_main, meet
from clara_jax.config import TrainConfig
from clara_jax.corpus.passages import Passage
from clara_jax.data.pipeline import Data, cache_folder
from clara_jax.data.tokenizer import ClaraTokenizer
from clara_jax.encoding import Encoder, fingerprint
from clara_jax.errors import fail
from clara_jax.models.roles import Params
from clara_jax.pretrained import Pretrained
from clara_jax.progress import CountProgress
from clara_jax.retrieval.manifest import StoreSettings
from clara_jax.retrieval.store import MemoryStore
from clara_jax.retrieval.writer import StoreWriter
from clara_jax.training.stages import STAGES

_SEGMENT = 1024  # documents; a killed run loses at most the work on so many
_PASSAGES = 8192  # passages of a user's store that are tokenised at a time
_ONE_CACHE = "Give all processes the same data.cache_dir, in a place that all of them see"
Digest = bytes  # of a document's tokens


@dataclasses.dataclass(frozen=True)
class CandidateMemories:
    """Where the memory of each document of each sample is: memory `numbers[i]` of the store at `locations[stores[i]]`.

    Those of sample s are the entries `starts[s]` to `starts[s + 1]`. Reading is safe from several threads, and a pickle
    holds these fields alone.
    """

    locations: tuple[str, ...]
    dtype: np.dtype
    starts: Int[np.ndarray, " ends"]
    stores: Int[np.ndarray, " documents"]
    numbers: Int[np.ndarray, " documents"]

    def __getstate__(self) -> dict[str, object]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def of_samples(self, numbers: Int[np.ndarray, " samples"]) -> list[Float[np.ndarray, "_ memory hidden"]]:
        """The memories of those samples' documents; -1 is a masked row, which has none."""
        spans = [range(self.starts[n], self.starts[n + 1]) if n >= 0 else range(0) for n in numbers]
        entries = np.array([i for span in spans for i in span], int)
        settings = self._opened[0].settings
        found = np.empty((len(entries), settings.memory, settings.hidden), self.dtype)
        for store in np.unique(self.stores[entries]):
            places = np.flatnonzero(self.stores[entries] == store)
            found[places] = self._opened[store].memories(self.numbers[entries[places]])
        return np.split(found, np.cumsum([len(span) for span in spans])[:-1])

    @functools.cached_property
    def _opened(self) -> list[MemoryStore]:
        return [MemoryStore.open(location) for location in self.locations]


def uses_store(config: TrainConfig) -> bool:
    """Whether a run reads the candidates' memories from a store: it trains on retrieval, not what makes memories."""
    fixed = not {"compressor", "memory_tokens"} & set(config.trains)
    return STAGES[config.stage].samples == "retrieval" and config.data.memories == "store" and fixed


def store_candidates(
    config: TrainConfig, model: Pretrained, params: Params, data: Data, mesh: Mesh, report: Callable[[str], None]
) -> CandidateMemories:
    """Find the memories of all documents of `data`, and compress those that are nowhere to be found.

    `params` are the model's on the `mesh`. Raises `UserError` for a store of another compressor, and where processes do
    not see the same one.
    """
    compressor = fingerprint(model)
    digests, order = _distinct(data)
    named = [MemoryStore.open(location, compressor) for location in config.data.stores]
    places: dict[Digest, tuple[int, int]] = {}
    for number, store in enumerate(named, 1):
        before = len(places)
        for row, digest in enumerate(_digests_of(store, model.tokenizer, config.model.doc_max_length)):
            if digest in order:
                places.setdefault(digest, (number, row))
        report(f"{store.location}: memories of {len(places) - before} of {len(order)} candidates")
    own = _OwnStore(config, model, compressor)
    missing = [digest for digest in order if digest not in places]
    own.add(missing, order, data, params, mesh, report)
    locations = (own.location, *(store.location for store in named))
    places.update({digest: (0, row) for digest, row in own.numbers().items()})
    found = np.array([places[digest] for of_sample in digests for digest in of_sample], np.int64).reshape(-1, 2)
    starts = np.cumsum([0, *map(len, digests)])
    return CandidateMemories(
        locations, np.dtype(model.model.decoder.dtype), starts, found[:, 0].astype(np.int16), found[:, 1]
    )


class _OwnStore:
    """The store beside the token cache: a document per distinct candidate, which is named by its tokens' digest."""

    def __init__(self, config: TrainConfig, model: Pretrained, compressor: str):
        dtype = np.dtype(model.model.decoder.dtype).name
        self._model = model
        self.location = str(cache_folder(config.data).parent / "memories" / f"{compressor}-{dtype}")
        self._settings = StoreSettings(
            compressor=compressor,
            memory=model.checkpoint.num_memory,
            hidden=model.model.decoder.config.hidden_size,
            memory_type="float32" if dtype == "float32" else "bfloat16",
            limit=config.model.doc_max_length,
            overlap=0,
        )

    def numbers(self) -> dict[Digest, int]:
        """The number of each memory of the store by the digest of its document's tokens."""
        if not (Path(self.location) / "manifest.json").exists():
            fail(f"{self.location}, made by the first process, is not there", _ONE_CACHE)
        names = (name for table in MemoryStore.open(self.location).tables() for name in table["document"].to_pylist())
        return {bytes.fromhex(name): number for number, name in enumerate(names)}

    def add(
        self,
        digests: Sequence[Digest],
        order: dict[Digest, tuple[int, int]],
        data: Data,
        params: Params,
        mesh: Mesh,
        report: Callable[[str], None],
    ) -> None:
        """Compress what of `digests` the store does not have. All processes compute, the first one writes.

        Other runs that need memories of the same compressor wait until this one has stored its own.
        """
        with self._alone(report):
            writer = StoreWriter(self.location, self._settings)
            known = writer.digests()
            missing = [digest for digest in digests if digest.hex() not in known]
            _require_agreement(missing, self.location)
            report(
                f"memories of {len(missing)} candidates are to be compressed, {len(order) - len(missing)} are stored; "
                f"{self.location} keeps them"
            )
            self._compress(writer, missing, order, data, Encoder(self._model, params, mesh))

    def _compress(
        self,
        writer: StoreWriter,
        missing: Sequence[Digest],
        order: dict[Digest, tuple[int, int]],
        data: Data,
        encoder: Encoder,
    ) -> None:
        groups = [missing[i : i + _SEGMENT] for i in range(0, len(missing), _SEGMENT)]
        segments = [writer.find(self._key(group)) for group in groups]
        meet("candidates found")  # before the first process writes what the others look for
        progress = CountProgress(len(missing), "candidate")
        try:
            for number, group in enumerate(groups):
                if segments[number] is not None:
                    progress.advance(len(group))
                    continue
                places = [order[digest] for digest in group]
                texts = [data.sample(sample).documents[document] for sample, document in places]
                memories = encoder("compressor", texts, progress.advance).memories
                if is_main():
                    # Memories are read one by one: a chunk for each.
                    segments[number] = writer.write(self._key(group), self._passages(group, texts), memories, 1)
        finally:
            progress.close()
        if is_main() and groups:
            added = [
                (segment, {digest.hex(): digest for digest in group})
                for segment, group in zip(segments, groups, strict=True)
                if segment is not None
            ]
            writer.commit(added, ())
        meet("candidates committed")

    @contextlib.contextmanager
    def _alone(self, report: Callable[[str], None]) -> Iterator[None]:
        """No other run changes the store in the block. The first process holds the lock, and a killed one loses it."""
        lock = filelock.FileLock(f"{self.location}.lock")
        if is_main():
            Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                report(f"another run is storing memories in {self.location}: waiting for it")
                lock.acquire()
        meet("candidates locked")
        try:
            yield
        finally:
            lock.release()

    def _key(self, group: Sequence[Digest]) -> str:
        settings = json.dumps(dataclasses.asdict(self._settings)).encode()
        return hashlib.sha256(settings + b"".join(group)).hexdigest()[:32]

    def _passages(self, group: Sequence[Digest], texts: Sequence[list[int]]) -> list[Passage]:
        decoded = [self._model.tokenizer.decode(text) for text in texts]
        return [Passage(digest.hex(), 0, 0, len(text), "", text) for digest, text in zip(group, decoded, strict=True)]


def _distinct(data: Data) -> tuple[list[list[Digest]], dict[Digest, tuple[int, int]]]:
    """The digests of every sample's documents, and where each distinct document is first: (sample, place)."""
    digests: list[list[Digest]] = []
    first: dict[Digest, tuple[int, int]] = {}
    for dataset in data.datasets:
        for documents in dataset.documents():
            of_sample = [_digest(tokens) for tokens in documents]
            for place, digest in enumerate(of_sample):
                first.setdefault(digest, (len(digests), place))
            digests.append(of_sample)
    return digests, first


def _digests_of(store: MemoryStore, tokenizer: ClaraTokenizer, limit: int) -> Iterator[Digest]:
    """The digest of the tokens that each memory of a store was made from, in order."""
    for table in store.tables():
        names = [field.name for field in dataclasses.fields(Passage)]
        for part in table.select(names).to_batches(_PASSAGES):
            texts = [Passage(**row).titled_text for row in part.to_pylist()]
            yield from (_digest(np.array(ids, np.int32)) for ids, _ in tokenizer.encode_passages(texts, limit))


def _digest(tokens: Int[np.ndarray, " tokens"]) -> Digest:
    return hashlib.sha256(tokens.tobytes()).digest()[:16]


def _require_agreement(missing: Sequence[Digest], location: str) -> None:
    """Refuse to go on where the processes do not lack the same documents: they would wait for each other for ever."""
    if jax.process_count() == 1:
        return
    mine = np.frombuffer(hashlib.sha256(b"".join(missing)).digest(), np.uint8)
    if np.any(multihost_utils.process_allgather(mine) != mine):
        fail(f"{location} does not hold the same for all processes", _ONE_CACHE)
