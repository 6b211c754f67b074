"""The memory store: what is written comes back, what is not committed is not seen, what is damaged is refused."""

import dataclasses
import itertools
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

from clara_jax.corpus.passages import Passage
from clara_jax.errors import UserError
from clara_jax.retrieval.index import MemoryIndex
from clara_jax.retrieval.manifest import StoreSettings
from clara_jax.retrieval.search import search
from clara_jax.retrieval.store import MemoryStore
from clara_jax.retrieval.writer import StoreWriter
from clara_jax.sharding import MeshConfig, make_mesh

SETTINGS = StoreSettings(compressor="model", memory=3, hidden=16, memory_type="bfloat16", limit=40, overlap=8)
BUCKETS = itertools.count()


@pytest.fixture(params=["folder", "bucket"])
def location(request, tmp_path):
    """TensorStore's memory:// behaves as a bucket does: objects appear whole, there are no folders."""
    return str(tmp_path / "store") if request.param == "folder" else f"memory://bucket{next(BUCKETS)}/store"


def passages_of(sizes):
    """So many passages of each document."""
    return [
        Passage(name, n, 10 * n, 10 * n + 9, f"Title {name}", f"{name} part {n}")
        for name, number in sizes.items()
        for n in range(number)
    ]


def add(writer, sizes, seed=0):
    """A segment of documents with so many passages each: (what `commit` takes, the memories)."""
    passages = passages_of(sizes)
    memories = np.random.default_rng(seed).standard_normal((len(passages), 3, 16)).astype(np.float32)
    return (writer.write(f"key{seed}", passages, memories), {name: bytes(16) for name in sizes}), memories


def filled(location, settings=SETTINGS):
    """A store of two segments, and its memories."""
    writer = StoreWriter(location, settings)
    first, a = add(writer, {"ada": 2, "bob": 1}, 1)
    second, b = add(writer, {"cyd": 3}, 2)
    writer.commit([first, second], [])
    return MemoryStore.open(location), np.concatenate([a, b])


@pytest.mark.parametrize("memory_type", ["bfloat16", "int8"])
def test_what_is_written_comes_back(location, memory_type):
    """If this broke, answers would be made from other memories, or name other passages, than were compressed."""
    store, memories = filled(location, dataclasses.replace(SETTINGS, memory_type=memory_type))
    assert (len(store), store.manifest.documents, store.manifest.passages) == (6, 3, 6)
    order = np.array([5, 0, 3, 3])
    assert store.passages(order) == [passages_of({"ada": 2, "bob": 1, "cyd": 3})[n] for n in order]
    if memory_type == "bfloat16":
        np.testing.assert_array_equal(
            store.memories(order), memories[order].astype(ml_dtypes.bfloat16).astype(np.float32)
        )
    else:  # half a step of the scale: the largest entry of a memory is 127 steps
        step = np.abs(memories[order]).max(axis=(1, 2), keepdims=True) / 127
        assert (np.abs(store.memories(order) - memories[order]) <= step * 0.501).all()
    whole = np.concatenate(list(store.blocks(4)))
    assert [len(block) for block in store.blocks(4)] == [4, 2] and whole.shape == (6, 48)
    np.testing.assert_array_equal(search(memories.reshape(6, -1), store.blocks(4), 1).indices[:, 0], np.arange(6))
    with pytest.raises(IndexError):
        store.memories(np.array([6]))


def test_only_committed_generations_are_seen(location):
    """If this broke, a reader would answer from half a corpus while it is compressed, or after a kill."""
    with pytest.raises(UserError, match="holds no memory store"):
        MemoryStore.open(location)
    writer = StoreWriter(location, SETTINGS)
    part, _ = add(writer, {"ada": 2})
    with pytest.raises(UserError, match="holds no memory store"):
        MemoryStore.open(location)
    writer.commit([part], [])
    before = MemoryStore.open(location)
    writer = StoreWriter(location, SETTINGS)
    part, new = add(writer, {"ada": 1, "eve": 1}, 3)
    assert len(MemoryStore.open(location)) == 2
    writer.commit([part], [])
    assert len(before.memories(np.arange(2))) == 2  # a reader keeps the generation that it has opened
    now = MemoryStore.open(location)
    assert [p.document for p in now.passages(np.arange(2))] == ["ada", "eve"] and now.manifest.generation == 2
    np.testing.assert_allclose(now.memories(np.arange(2)), new, rtol=2**-8)  # bfloat16


def test_replaced_and_deleted_documents_are_dead(location):
    """If this broke, deleted documents would go on being found, or others would vanish with them."""
    filled(location)
    writer = StoreWriter(location)
    changed, new = add(writer, {"ada": 1}, 4)
    manifest = writer.commit([changed], ["bob"])
    store = MemoryStore.open(location)
    assert (manifest.documents, len(store)) == (2, 4)
    assert [p.document for p in store.passages(np.arange(4))] == ["cyd", "cyd", "cyd", "ada"]
    np.testing.assert_allclose(store.memories(np.array([3])), new, rtol=2**-8)  # bfloat16
    assert not any("key1" in name for name in manifest.names())  # all of its documents are gone
    StoreWriter(location).commit([], ["cyd"])
    assert not any("key1" in name for name in store.objects.names())  # and nobody needs it since two generations
    StoreWriter(location).commit([], ["ada"])
    empty = MemoryStore.open(location)
    assert len(empty) == 0 and list(empty.blocks()) == []


def test_part_of_a_segment_may_be_dead(location):
    """Rows of a segment that are not one range: the numbers of memories must still be those of their passages."""
    writer = StoreWriter(location, SETTINGS)
    part, memories = add(writer, {"a": 2, "b": 1, "c": 2, "d": 1})
    writer.commit([part], [])
    StoreWriter(location).commit([], ["b", "d"])
    store = MemoryStore.open(location)
    assert [p.document for p in store.passages(np.arange(4))] == ["a", "a", "c", "c"]
    kept = memories[[0, 1, 3, 4]].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.concatenate(list(store.blocks(3))), kept.reshape(4, -1))
    np.testing.assert_array_equal(store.memories(np.array([2])), kept[2:3].astype(np.float32))


def test_two_writers_cannot_both_commit(location):
    """If this broke, the second of two commands at once would silently undo what the first has added."""
    filled(location)
    first, second = StoreWriter(location), StoreWriter(location)
    first.commit([], ["ada"])
    with pytest.raises(UserError, match="changed by another process meanwhile"):
        second.commit([], ["bob"])
    assert MemoryStore.open(location).manifest.documents == 2


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("pattern", "harm", "message"),
    [
        ("segments/key1/memories/c/0/0/0", flip, "segments/key1/memories is damaged"),
        ("segments/key1/memories/c/0/0/0", lambda p: p.write_bytes(p.read_bytes()[:-3]), "segments/key1/memories"),
        ("segments/key1/memories/c/0/0/0", lambda p: p.unlink(), "key1/memories/c/0/0/0 is missing"),
        ("segments/key1/passages.parquet", flip, "passages.parquet is damaged: its checksum"),
        ("segments/key2/segment.json", lambda p: p.unlink(), "segments/key2/segment.json is missing"),
        ("documents/*.parquet", flip, "parquet is damaged: its checksum"),
        ("documents/*.parquet", lambda p: p.unlink(), "parquet is missing"),
        ("manifest.json", flip, "manifest.json is damaged"),
        ("manifest.json", lambda p: p.write_bytes(b"[1]"), "manifest.json is damaged"),
    ],
)
def test_damage_is_refused_by_name(tmp_path, pattern, harm, message):
    """If this broke, a rotten disk or a partial copy would give wrong answers without a word."""
    filled(tmp_path)
    (path,) = tmp_path.glob(pattern)
    harm(path)
    with pytest.raises(UserError, match=message):
        store = MemoryStore.open(tmp_path)
        store.memories(np.arange(6))
        store.passages(np.arange(6))


def test_a_store_of_a_newer_format_is_refused(tmp_path):
    """If this broke, an old program would read a new store by the wrong rules."""
    filled(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(UserError, match=r"is of format 2; this version .* reads format 1\. Upgrade"):
        MemoryStore.open(tmp_path)


def test_a_store_of_another_model_is_refused(tmp_path):
    """If this broke, questions of one model would be compared with memories of another: noise, without a word."""
    filled(tmp_path)
    MemoryStore.open(tmp_path, "model")
    with pytest.raises(UserError, match="memories of another compressor"):
        MemoryStore.open(tmp_path, "other")
    with pytest.raises(UserError, match="memories of another compressor"):
        StoreWriter(tmp_path, dataclasses.replace(SETTINGS, compressor="other"))
    with pytest.raises(UserError, match="was made with overlap 8, now it is 9"):
        StoreWriter(tmp_path, dataclasses.replace(SETTINGS, overlap=9))


def test_repair_leaves_out_damaged_segments(tmp_path):
    """If this broke, one bad sector would cost the compression of a whole corpus."""
    filled(tmp_path)
    (tmp_path / "segments/key1/memories/c/0/0/0").unlink()
    flip(tmp_path / "segments/key2/passages.parquet")
    writer = StoreWriter(tmp_path)
    assert len(writer.drop_damaged()) == 2 and writer.digests() == {}
    assert writer.find("key1") is None  # or the damage would come back
    again, _ = add(writer, {"ada": 2, "bob": 1}, 1)
    writer.commit([again], [])
    assert len(MemoryStore.open(tmp_path)) == 3 and StoreWriter(tmp_path).drop_damaged() == []


def test_several_stores_are_one_index(tmp_path):
    """If this broke, a passage would be named of the wrong store, or a resident index would rank differently."""
    one, a = filled(tmp_path / "one")
    writer = StoreWriter(tmp_path / "two", dataclasses.replace(SETTINGS, memory_type="int8"))
    part, b = add(writer, {"fay": 2}, 7)
    writer.commit([part], [])
    stores = [one, MemoryStore.open(tmp_path / "two")]
    memories = np.concatenate([a, b])
    resident, streamed = MemoryIndex(stores), MemoryIndex(stores, device_bytes=0)
    assert resident.resident and not streamed.resident and len(resident) == 8
    for index in (resident, streamed, resident):  # the second search of a resident index is in what it has kept
        found = index.search(memories, 3)
        np.testing.assert_array_equal(found.indices[:, 0], np.arange(8))
        np.testing.assert_array_equal(found.scores, streamed.search(memories, 3).scores)
    assert [(where.rsplit("/", 1)[1], p.document) for where, p in resident.passages(np.array([6, 2]))] == [
        ("two", "fay"),
        ("one", "bob"),
    ]
    np.testing.assert_allclose(resident.memories(np.arange(8)), memories, atol=np.abs(memories).max() / 127)


def test_a_store_can_be_copied(tmp_path):
    """A store names nothing outside itself: moved or copied, it is the same store."""
    filled(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert len(MemoryStore.open(tmp_path / "there").memories(np.arange(6))) == 6


@pytest.mark.parametrize("name", ["nowhere://x", "gs:/bucket"])
def test_an_address_that_is_none(name, tmp_path, monkeypatch):
    """A mistyped address is said to be one; a path with a colon is only a path without a store."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"cannot be opened|holds no memory store"):
        MemoryStore.open(name)


def test_streamed_blocks_are_not_padding():
    """Blocks of a few rows, each filled up to a tile on every device: streaming would search mostly zeros."""
    writer = StoreWriter(f"memory://bucket{next(BUCKETS)}/store", SETTINGS)
    writer.commit([add(writer, {"ada": 700})[0]], [])
    store = MemoryStore.open(writer.objects.location)
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    for rows, sizes in ((1, [256, 256, 188]), (511, [256, 256, 188]), (513, [512, 188])):
        index = MemoryIndex([store], mesh, device_bytes=0, block_bytes=rows * store.row_bytes)
        assert [len(block) for block in index.blocks()] == sizes
