"""A source is tokenised once and kept on disk, in a folder named by everything that the result depends on.

The instruction of a paraphrase record is drawn from the seed and the record's row number: it is the same in every
epoch and in every run with that seed, or it could not be kept.
"""

import contextlib
import dataclasses
import hashlib
import inspect
import itertools
import json
import os
import random
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from clara_jax.data import prompts, records, samples, tokenized
from clara_jax.data import tokenizer as tokenizer_code
from clara_jax.data.collate import memory_columns
from clara_jax.data.records import BadRecordPolicy, FieldError
from clara_jax.data.samples import Limits, Sample, SampleKind, SampleTexts, sample_texts, tokenize_texts
from clara_jax.data.sources import BadRecords, Source, open_source
from clara_jax.data.tokenized import TokenizedDataset, write_samples
from clara_jax.data.tokenizer import ClaraTokenizer
from clara_jax.errors import UserError, fail

# The code that decides what is in the folder: a change of it makes new folders.
_CODE = (records, prompts, samples, tokenizer_code, tokenized)
_CHUNK = 256
_STALE_SECONDS = 24 * 3600


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How records become samples: the stage's kind of sample, limits, documents per prompt, seed, bad records."""

    kind: SampleKind
    limits: Limits
    top_k: int
    seed: int
    on_bad_record: BadRecordPolicy = "stop"


def default_cache_dir() -> Path:
    """`clara_jax/tokens` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clara_jax" / "tokens"


def tokenize(
    name: str,
    tokenizer: ClaraTokenizer,
    recipe: Recipe,
    cache_dir: Path,
    report: Callable[[str], None] = print,
) -> TokenizedDataset:
    """The samples of the source `name`, from the cache if it holds them, else made and put there.

    `report` says what takes its time: tokenising, and that a damaged folder has to be made again. Processes may
    make the same folder at the same time: the first to finish wins. Raises `UserError` for a source that cannot be
    read, that holds no usable record or (under `stop`) a bad one, and for a cache that cannot be written.
    """
    source = open_source(name)
    folder = cache_dir / _key(source, tokenizer, recipe)
    for _ in range(3):
        found = _open(folder, report)
        if found is not None:
            return found
        report(f"{name}: tokenising into {folder}")
        try:
            _build(folder, source, tokenizer, recipe)
        except OSError as error:
            reason = error.strerror or str(error)
            fail(f"the token cache {cache_dir} cannot be written ({reason})", "Free space, or set data.cache_dir")
    fail(f"the token cache {folder} does not read as it was written", "Check the disk, or set data.cache_dir")


def _key(source: Source, tokenizer: ClaraTokenizer, recipe: Recipe) -> str:
    backend = tokenizer.backend
    used = dataclasses.asdict(recipe)
    # What does not matter to a kind of sample must not make it again.
    if recipe.kind != "compression":
        used.pop("seed")
    if recipe.kind != "retrieval":
        used.pop("top_k")
    parts = [
        source.fingerprint,
        backend.backend_tokenizer.to_str(),
        json.dumps([backend.chat_template, backend.special_tokens_map], sort_keys=True, default=str),
        json.dumps([dataclasses.asdict(tokenizer.special), used], sort_keys=True),
        *[inspect.getsource(module) for module in _CODE],
    ]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part.encode("utf-8")).digest())
    return digest.hexdigest()[:32]


def _open(folder: Path, report: Callable[[str], None]) -> TokenizedDataset | None:
    """The dataset in `folder`; None if there is none, and if it was damaged and is now gone."""
    if not folder.exists():
        return None
    path = folder / "samples.arrow"
    try:
        info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        checksum = _checksum(path)
        if checksum == info["checksum"]:
            return TokenizedDataset(path, folder.name, checksum, info["samples"], info["skipped"], info["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # whatever of it is missing or garbled, it is made again
    report(f"{folder}: tokenised data is damaged, making it again")
    # Another process may be doing the same: what is renamed is gone for both.
    with contextlib.suppress(OSError):
        shutil.rmtree(folder.rename(_partial(folder)))
    return None


def _build(folder: Path, source: Source, tokenizer: ClaraTokenizer, recipe: Recipe) -> None:
    """Fill a folder with a name of its own, then give it the name `folder` unless somebody else just did."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder)
    partial = _partial(folder)
    partial.mkdir()
    try:
        bad = BadRecords(source.name, recipe.on_bad_record)
        path = partial / "samples.arrow"
        made = _samples(source, tokenizer, recipe, bad)
        count = write_samples(path, made, tokenizer.special.num_memory)
        if count == 0:
            first = f", first: {bad.first}" if bad.first else ""
            fail(f"{source.name} holds no usable record ({bad.count} bad ones{first})", "Give a source with records")
        info = {"source": source.name, "samples": count, "skipped": bad.count, "reason": bad.first}
        text = json.dumps({**info, "checksum": _checksum(path)}, indent=1)
        (partial / "info.json").write_text(text, encoding="utf-8")
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster, with the same samples
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _samples(source: Source, tokenizer: ClaraTokenizer, recipe: Recipe, bad: BadRecords) -> Iterator[Sample]:
    """Samples of all usable records, tokenised some hundreds at a time; `bad` gets the others."""
    for chunk in _chunks(_texts(source, recipe, bad)):
        made = tokenize_texts([texts for _, texts in chunk], tokenizer, recipe.limits)
        for (where, _), sample in zip(chunk, made, strict=True):
            try:
                memory_columns(sample.exchange.tokens, sample.slots, tokenizer.special)
            except UserError as error:
                bad.add(where, FieldError(str(error).removesuffix(".")))
            else:
                yield sample


def _texts(source: Source, recipe: Recipe, bad: BadRecords) -> Iterator[tuple[str, SampleTexts]]:
    for row, (where, record) in enumerate(source.records()):
        try:
            if isinstance(record, FieldError):
                raise record
            draws = random.Random(f"{recipe.seed} {row}")
            yield where, sample_texts(record, recipe.kind, recipe.top_k, draws)
        except FieldError as error:
            bad.add(where, error)


def _chunks(items: Iterable[tuple[str, SampleTexts]]) -> Iterator[list[tuple[str, SampleTexts]]]:
    items = iter(items)
    while chunk := list(itertools.islice(items, _CHUNK)):
        yield chunk


def _checksum(path: Path) -> str:
    """Size and CRC-32 of a file."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
        return f"{file.tell()}-{checksum:08x}"


def _partial(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.partial")


def _remove_stale(folder: Path) -> None:
    """Remove what processes that were killed a day or longer ago left behind."""
    for partial in folder.parent.glob("*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - max(entry.stat().st_mtime for entry in (partial, *partial.iterdir())) > _STALE_SECONDS:
                shutil.rmtree(partial)
