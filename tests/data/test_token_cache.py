"""The token cache: nothing is tokenised twice, and nothing stale, damaged or half-written is ever used."""

import dataclasses
import errno
import itertools
import json
import random
import shutil
import threading

import pytest

from clara_jax.data import token_cache
from clara_jax.data.records import parse_record
from clara_jax.data.samples import Limits, compression_sample
from clara_jax.data.token_cache import Recipe, default_cache_dir, tokenize
from clara_jax.data.tokenized import ROWS
from clara_jax.errors import UserError
from tests.data.examples import GOOD, LIST, PARAPHRASE, SINGLE, changed, questions, small_tokenizer, write_lines

LIMITS = Limits(40, 20, 400)
RETRIEVAL = Recipe("retrieval", LIMITS, 2, 0)
COMPRESSION = Recipe("compression", LIMITS, 2, 0)


@pytest.fixture
def made(monkeypatch):
    """A list that grows with each folder that is made."""
    calls, build = [], token_cache._build

    def counted(folder, *rest):
        calls.append(folder.name)
        build(folder, *rest)

    monkeypatch.setattr(token_cache, "_build", counted)
    return calls


def all_samples(dataset):
    return [dataset.sample(i) for i in range(len(dataset))]


def test_paraphrase_instructions_are_a_function_of_seed_and_row(tmp_path):
    """The order of training, or a bad line before it, would change what a record asks for."""
    rows = [changed(PARAPHRASE, docs=["Said."]) for _ in range(40)]
    tokenizer = small_tokenizer()

    def prompts(name, *lines, seed=0):
        recipe = Recipe("compression", LIMITS, 2, seed, "skip")
        dataset = tokenize(str(write_lines(tmp_path / name, *lines)), tokenizer, recipe, tmp_path / "cache")
        return [sample.exchange.tokens for sample in all_samples(dataset)]

    whole = prompts("a.jsonl", *rows)
    assert len(set(map(tuple, whole))) > 8
    assert prompts("b.jsonl", b"{", *rows[1:]) == whole[1:]
    assert prompts("a.jsonl", *rows, seed=1) != whole
    texts = tokenize(str(write_lines(tmp_path / "c.jsonl", *GOOD)), tokenizer, COMPRESSION, tmp_path / "cache")
    assert [sample.answers for sample in all_samples(texts)] == [
        ("Question: Who?\nAnswer: Ada\nQuestion: When?\nAnswer: 1843",),
        ("Said anew.",),
        ("Question: Who?\nAnswer: Ada",),
    ]
    known = compression_sample(parse_record(LIST), tokenizer, LIMITS, random.Random(0))
    assert texts.sample(0) == known


def test_what_makes_a_new_folder_and_what_does_not(tmp_path, made):
    """Hours of tokenising would be repeated, or another setting's tokens be used."""
    path = write_lines(tmp_path / "data.jsonl", *questions(3))
    copy = shutil.copy(path, tmp_path / "copy.jsonl")
    tokenizer = small_tokenizer()

    def use(name=path, tokenizer=tokenizer, recipe=RETRIEVAL):
        before = len(made)
        tokenize(str(name), tokenizer, recipe, tmp_path / "cache")
        return len(made) - before

    replace = dataclasses.replace
    assert use() == 1
    assert use() == use(copy) == use(recipe=replace(RETRIEVAL, seed=5)) == 0
    assert use(tokenizer=small_tokenizer(memory=3)) == 1
    assert use(tokenizer=small_tokenizer(name="metaspace_system_merged")) == 1
    for recipe in (
        replace(RETRIEVAL, top_k=1),
        replace(RETRIEVAL, kind="instruction"),
        replace(RETRIEVAL, kind="compression"),
        replace(RETRIEVAL, kind="compression", seed=5),
        replace(RETRIEVAL, on_bad_record="skip"),
        *[replace(RETRIEVAL, limits=replace(LIMITS, **{key: 30})) for key in ("document", "question")],
        replace(RETRIEVAL, limits=replace(LIMITS, prompt=300)),
    ):
        assert (use(recipe=recipe), use(recipe=recipe)) == (1, 0), recipe
    assert use(recipe=replace(RETRIEVAL, kind="instruction", top_k=7)) == 0
    write_lines(path, *questions(4))
    assert use() == 1


def test_another_chat_template_makes_a_new_folder(tmp_path, made):
    """A mended template would have no effect until somebody thought of removing the cache."""
    path = str(write_lines(tmp_path / "data.jsonl", *questions(3)))
    tokenizer = small_tokenizer.__wrapped__(memory=2)
    tokenize(path, tokenizer, RETRIEVAL, tmp_path / "cache")
    tokenizer.backend.chat_template += " "
    tokenize(path, tokenizer, RETRIEVAL, tmp_path / "cache")
    assert len(made) == 2


def damage_samples(folder, change):
    path = folder / "samples.arrow"
    path.write_bytes(change(path.read_bytes()))


DAMAGE = {
    "cut short": lambda folder: damage_samples(folder, lambda data: data[:-100]),
    "one bit": lambda folder: damage_samples(folder, lambda data: data[:2000] + bytes([data[2000] ^ 1]) + data[2001:]),
    "zeros": lambda folder: damage_samples(folder, lambda data: bytes(len(data))),
    "empty": lambda folder: damage_samples(folder, lambda data: b""),
    "no samples": lambda folder: (folder / "samples.arrow").unlink(),
    "no info": lambda folder: (folder / "info.json").unlink(),
    "half an info": lambda folder: (folder / "info.json").write_text('{"samples": 3'),
    "another info": lambda folder: (folder / "info.json").write_text("[1]"),
    "info without a count": lambda folder: (folder / "info.json").write_text(
        json.dumps({k: v for k, v in json.loads((folder / "info.json").read_text()).items() if k != "samples"})
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_made_again(damage, tmp_path, made):
    """A run after a crash of the machine would train on zeros, or never start again."""
    path = str(write_lines(tmp_path / "data.jsonl", *questions(20)))
    expected = all_samples(tokenize(path, small_tokenizer(), RETRIEVAL, tmp_path / "cache"))
    (folder,) = (tmp_path / "cache").iterdir()
    damage(folder)
    said = []
    assert all_samples(tokenize(path, small_tokenizer(), RETRIEVAL, tmp_path / "cache", said.append)) == expected
    assert len(made) == 2
    assert len(said) == 2
    assert str(folder) in said[0]
    assert "damaged" in said[0]
    assert "tokenising" in said[1]
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [folder.name]


def test_two_builders_at_once(tmp_path, monkeypatch):
    """Processes of one machine start together: one would fail, or read what the other has half written."""
    path = str(write_lines(tmp_path / "data.jsonl", *questions(20)))
    together, write = threading.Barrier(3), token_cache.write_samples

    def write_together(*args):
        together.wait(timeout=20)  # all have seen that there is no folder
        return write(*args)

    monkeypatch.setattr(token_cache, "write_samples", write_together)
    found = []
    run = lambda: found.append(all_samples(tokenize(path, small_tokenizer(), RETRIEVAL, tmp_path / "cache")))  # noqa: E731
    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert found[0] == found[1] == found[2]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_full_disk(tmp_path, monkeypatch):
    """Half a folder would be left behind on a disk that is full already, and the message be a traceback."""
    path = str(write_lines(tmp_path / "data.jsonl", *questions(20)))

    def full(path, samples, num_memory):
        path.write_bytes(b"some")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(token_cache, "write_samples", full)
    with pytest.raises(UserError, match=r"cache .* cannot be written \(No space left on device\).*data\.cache_dir"):
        tokenize(path, small_tokenizer(), RETRIEVAL, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_that_cannot_be_made(tmp_path):
    """A read-only or mistyped cache folder would end in a traceback."""
    path = str(write_lines(tmp_path / "data.jsonl", *questions(2)))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir"):
        tokenize(path, small_tokenizer(), RETRIEVAL, tmp_path / "file" / "cache")


def test_what_killed_builders_left_is_removed_in_time(tmp_path, monkeypatch):
    """Gigabytes of half-written folders would pile up; one that is being written must stay."""
    path = str(write_lines(tmp_path / "data.jsonl", *questions(2)))
    left = tmp_path / "cache" / "abc.12345678.partial"
    left.mkdir(parents=True)
    (left / "samples.arrow").write_bytes(b"half")
    tokenize(path, small_tokenizer(), RETRIEVAL, tmp_path / "cache")
    assert left.exists()
    now = token_cache.time.time()
    monkeypatch.setattr(token_cache.time, "time", lambda: now + 2 * 24 * 3600)
    tokenize(path, small_tokenizer(), COMPRESSION, tmp_path / "cache")
    assert not left.exists()


LONG = changed(SINGLE, question="cat " * 400)
BAD = {
    "no question": (PARAPHRASE, "field 'question' is missing; paraphrase rows belong to compression_pretraining"),
    "not JSON": (b"{", "the line is not JSON"),
    "not UTF-8": (b"\xff", "the line is not UTF-8"),
    "NaN": (b'{"question": NaN, "answer": "a", "docs": ["d"]}', "field 'question' must be a text, not nan"),
    "deep nesting": (b"[" * 100_000, "the line is not JSON"),
    "no room for memories": (changed(SINGLE, docs=["d"] * 200), "has no room for 200 memories"),
}


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize(("line", "reason"), BAD.values(), ids=BAD)
def test_bad_records_follow_the_policy(policy, line, reason, tmp_path):
    """One bad record among a million would stop a run that was to skip it, or vanish without a number."""
    path = write_lines(tmp_path / "data.jsonl", SINGLE, b"", line, line, SINGLE)
    recipe = Recipe("instruction", LIMITS, 2, 0, policy)
    if policy == "stop":
        with pytest.raises(UserError, match=f"{path}, line 3: .*{reason}"):
            tokenize(str(path), small_tokenizer(), recipe, tmp_path / "cache")
        assert not list((tmp_path / "cache").iterdir())
        return
    for _ in range(2):  # made, and from the cache
        dataset = tokenize(str(path), small_tokenizer(), recipe, tmp_path / "cache")
        assert (len(dataset), dataset.skipped) == (2, 2)
        assert dataset.reason.startswith("line 3: ")
        assert reason in dataset.reason


def test_sources_without_records(tmp_path):
    """A run would start on nothing."""
    for name, lines, count in (("empty.jsonl", [b""], 0), ("bad.jsonl", [b"{", b"["], r"2 bad ones, first: line 1")):
        path = write_lines(tmp_path / name, *lines)
        with pytest.raises(UserError, match=rf"{name} holds no usable record \({count}"):
            tokenize(str(path), small_tokenizer(), Recipe("compression", LIMITS, 1, 0, "skip"), tmp_path / "cache")


def test_writing_is_streamed(tmp_path, monkeypatch):
    """A data set of millions of records would not fit in memory."""
    read = itertools.count()
    seen = []
    rows = questions(1)[0]
    path = write_lines(tmp_path / "data.jsonl", *[rows] * (4 * ROWS))
    parse = token_cache.sample_texts
    monkeypatch.setattr(token_cache, "sample_texts", lambda *a: (next(read), parse(*a))[1])
    write = token_cache.write_samples

    def watched(path, samples, num_memory):
        return write(path, (seen.append(next(read)) or sample for sample in samples), num_memory)

    monkeypatch.setattr(token_cache, "write_samples", watched)
    tokenize(str(path), small_tokenizer(), RETRIEVAL, tmp_path / "cache")
    assert seen[0] <= ROWS


def test_the_default_folder(monkeypatch, tmp_path):
    """Users with a small home folder keep caches elsewhere, by this variable."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "clara_jax" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "clara_jax" / "tokens"
