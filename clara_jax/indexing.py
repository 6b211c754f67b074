"""A corpus into a memory store: what is new or changed is cut, compressed and committed; the rest is left alone.

The corpus is read twice: once to find all that is wrong with it and all that is new before anything is computed, and
once to compress. New documents are taken in their order, `segment` at a time. A segment's key is made of its documents
and of all that its memories depend on, so a killed run, given the same command, finds its segments again. In a run
of several processes each makes every n-th segment, and the first commits.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from clara_jax.cluster import is_main, meet
from clara_jax.corpus.documents import Document, Reading, read_documents
from clara_jax.corpus.passages import Passage, cut_passages
from clara_jax.data.records import BadRecordPolicy
from clara_jax.encoding import Encoder, fingerprint
from clara_jax.errors import fail
from clara_jax.pretrained import Pretrained
from clara_jax.progress import CountProgress
from clara_jax.retrieval.manifest import Manifest, StoreSettings
from clara_jax.retrieval.segments import MemoryType, Segment
from clara_jax.retrieval.writer import StoreWriter

T = TypeVar("T")
_LONG = 4096  # characters of a document; more of them on average make a segment of fewer documents
_AGAIN = "Give the same command again"


@dataclasses.dataclass(frozen=True)
class IndexConfig:
    """How a corpus is compressed.

    Args:
        overlap: The most tokens that a passage repeats from the one before.
        memory_type: How memories are stored; int8 has one scale per memory and half the size.
        segment: Documents per segment (fewer long ones); a killed run loses at most a segment per process.
        batch_tokens: Columns of a batch, padding included, on each device (default: 1024 on the CPU, else 8192).
        on_bad: What becomes of a document that cannot be used, stop or skip.
        prune: Delete the store's documents that the corpus does not have.
        repair: Read the whole store, and compress anew the documents of damaged segments.

    """

    overlap: int = 32
    memory_type: MemoryType = "bfloat16"
    segment: int = 1024
    batch_tokens: int | None = None
    on_bad: BadRecordPolicy = "stop"
    prune: bool = False
    repair: bool = False

    def __post_init__(self) -> None:
        for key, least in (("overlap", 0), ("segment", 1), ("batch_tokens", 1)):
            value = getattr(self, key)
            if value is not None and value < least:
                fail(f"{key} is {value}", f"Give at least {least}")


@dataclasses.dataclass(frozen=True)
class Indexed:
    """What became of a corpus: counts of documents, of passages compressed now, and remarks on what was left out.

    `found` counts the new documents whose segment an earlier run had made. `padding` is the share of the computed
    columns that is padding, None if nothing was compressed; `seconds` is the time of compressing.
    """

    new: int
    changed: int
    unchanged: int
    deleted: int
    found: int
    passages: int
    seconds: float
    padding: float | None
    remarks: list[str]
    store: Manifest | None


def index_corpus(
    loaded: Pretrained, location: str, corpus: Sequence[str], config: IndexConfig, mesh: Mesh | None = None
) -> Indexed:
    """Bring the store at `location` up to date with the corpus (sources as for `read_documents`).

    Raises `UserError` for whatever is wrong with the corpus or the store; the store is then as it was before.
    """
    writer = StoreWriter(location, store_settings(loaded, config))
    damaged = writer.drop_damaged() if config.repair else []
    known = writer.digests()
    reading = Reading()
    seen, fresh = _plan(read_documents(corpus, config.on_bad, reading), known)
    gone = [name for name in known if name not in seen] if config.prune else []
    progress = CountProgress(len(fresh), "document")
    start = time.monotonic()
    try:
        making = _Making(loaded, writer, config, mesh, progress)
        added = making.all_segments(fresh, read_documents(corpus, config.on_bad))
    finally:
        progress.close()
    seconds = time.monotonic() - start
    manifest = None
    if is_main() and (fresh or gone or damaged):
        manifest = writer.commit(added, gone)
    meet("committed")
    changed = sum(name in known for name in fresh)
    return Indexed(
        new=len(fresh) - changed,
        changed=changed,
        unchanged=len(seen) - len(fresh),
        deleted=len(gone),
        found=making.found,
        passages=making.passages,
        seconds=seconds,
        padding=making.padding / making.columns if making.columns else None,
        remarks=[*(f"compressed anew: {problem}" for problem in damaged), *reading.remarks()],
        store=manifest,
    )


def store_settings(loaded: Pretrained, config: IndexConfig) -> StoreSettings:
    """The settings of a store that `loaded` fills."""
    checkpoint, decoder = loaded.checkpoint, loaded.model.decoder.config
    return StoreSettings(
        compressor=fingerprint(loaded),
        memory=checkpoint.num_memory,
        hidden=decoder.hidden_size,
        memory_type=config.memory_type,
        limit=checkpoint.doc_max_length,
        overlap=config.overlap,
    )


def digest_of(document: Document) -> bytes:
    """16 bytes that stand for the document's title and text."""
    return hashlib.sha256(f"{document.title}\0{document.text}".encode()).digest()[:16]


def _plan(documents: Iterator[Document], known: dict[str, bytes]) -> tuple[set[str], dict[str, bytes]]:
    """The ids of all documents, and the digests of those that are not in the store as they are now."""
    seen, fresh = set(), {}
    for document in documents:
        seen.add(document.id)
        digest = digest_of(document)
        if known.get(document.id) != digest:
            fresh[document.id] = digest
    return seen, fresh


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """The documents of a segment to be made: their passages, and those in tokens; or the segment, if it is there."""

    key: str
    digests: dict[str, bytes]
    found: Segment | None = None
    passages: list[Passage] = dataclasses.field(default_factory=list)
    texts: list[list[int]] = dataclasses.field(default_factory=list)


class _Making:
    """Makes the segments of new documents, and counts."""

    def __init__(
        self, loaded: Pretrained, writer: StoreWriter, config: IndexConfig, mesh: Mesh | None, progress: CountProgress
    ):
        self._tokenizer, self._writer, self._config, self._progress = loaded.tokenizer, writer, config, progress
        self._encoder = Encoder(loaded, loaded.params, mesh, config.batch_tokens)
        self.found = self.passages = self.columns = self.padding = 0

    def all_segments(
        self, fresh: dict[str, bytes], documents: Iterator[Document]
    ) -> list[tuple[Segment, dict[str, bytes]]]:
        """The segments of the documents in `fresh`, complete, those of other processes too (main process only)."""
        prepared = []
        with concurrent.futures.ThreadPoolExecutor(1) as writing:  # one segment is written while the next is made
            written: concurrent.futures.Future | None = None
            for segment in _ahead(self._prepare(fresh, documents)):
                prepared.append(segment)
                if segment.found is None and segment.passages:
                    memories = self._compress(segment)
                    if written is not None:
                        written.result()
                    written = writing.submit(self._writer.write, segment.key, segment.passages, memories)
            if written is not None:
                written.result()
        meet("written")
        return [(self._segment(p), p.digests) for p in prepared] if is_main() else []

    def _prepare(self, fresh: dict[str, bytes], documents: Iterator[Document]) -> Iterator[_Prepared]:
        wanted = (document for document in documents if document.id in fresh)
        settings = json.dumps(dataclasses.asdict(self._writer.settings))
        taken = 0
        for number, group in enumerate(_groups(wanted, self._config.segment)):
            taken += len(group)
            for document in group:
                if digest_of(document) != fresh[document.id]:
                    fail(f"{document.where} has changed while the corpus was read", _AGAIN)
            digests = {document.id: fresh[document.id] for document in group}
            content = "".join(f"{name}\0{digest.hex()}\0" for name, digest in digests.items())
            key = hashlib.sha256(f"{settings}\0{content}".encode()).hexdigest()[:32]
            found = self._writer.find(key)
            if found is not None:
                self.found += len(group)
                self._progress.advance(len(group))
                yield _Prepared(key, digests, found)
            elif number % jax.process_count() != jax.process_index():
                yield _Prepared(key, digests)
            else:
                yield self._cut(key, digests, group)
        if taken < len(fresh):
            fail(f"{len(fresh) - taken} documents have vanished from the corpus while it was read", _AGAIN)

    def _cut(self, key: str, digests: dict[str, bytes], group: Sequence[Document]) -> _Prepared:
        limit, tokenizer = self._writer.settings.limit, self._tokenizer
        passages = [
            passage for document in group for passage in cut_passages(document, tokenizer, limit, self._config.overlap)
        ]
        texts = tokenizer.encode_passages([passage.titled_text for passage in passages], limit)
        return _Prepared(key, digests, None, passages, [ids for ids, _ in texts])

    def _compress(self, segment: _Prepared) -> np.ndarray:
        share = len(segment.digests) / len(segment.passages)
        encoded = self._encoder("compressor", segment.texts, lambda texts: self._progress.advance(texts * share))
        self.passages += len(segment.passages)
        self.columns += encoded.columns
        self.padding += encoded.padding
        return encoded.memories

    def _segment(self, prepared: _Prepared) -> Segment:
        found = prepared.found or self._writer.find(prepared.key)
        if found is None:
            fail(
                f"{self._writer.objects.location}: segment {prepared.key}, made by another process, is not there",
                "Give all processes the same store, in a place that all of them see",
            )
        return found


def _groups(documents: Iterator[Document], segment: int) -> Iterator[list[Document]]:
    """The documents of each segment: `segment` of them, or fewer long ones, for a segment is held in memory."""
    group: list[Document] = []
    characters = 0
    for document in documents:
        group.append(document)
        characters += len(document.text)
        if len(group) == segment or characters >= segment * _LONG:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The items in order, the next one made in a thread while one is used."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        ended = object()
        coming = thread.submit(next, items, ended)
        while (item := coming.result()) is not ended:
            coming = thread.submit(next, items, ended)
            yield item  # type: ignore[misc]
