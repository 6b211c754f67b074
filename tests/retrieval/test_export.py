"""Export: another program that reads the files must find each memory beside its own passage."""

import dataclasses
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clara_jax import convert
from clara_jax.errors import UserError, run_command
from clara_jax.retrieval import export
from clara_jax.retrieval.export import export_arrow, export_numpy
from clara_jax.retrieval.store import MemoryStore
from clara_jax.retrieval.writer import StoreWriter
from tests.retrieval.test_store import SETTINGS, add


@pytest.fixture(params=["bfloat16", "int8"])
def store(request, tmp_path):
    """Two segments, the first with dead rows in its middle."""
    location = tmp_path / "store"
    writer = StoreWriter(location, dataclasses.replace(SETTINGS, memory_type=request.param))
    writer.commit([add(writer, {"ada": 2, "bob": 3, "cyd": 4}, 1)[0], add(writer, {"eve": 2}, 2)[0]], [])
    StoreWriter(location).commit([], ["bob"])
    return MemoryStore.open(location)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Three memories at a time, so that pieces end within segments."""
    monkeypatch.setattr(export, "_PIECE_BYTES", 3 * 4 * 3 * 16)


def rows_of(store):
    return [dataclasses.asdict(passage) for passage in store.passages(np.arange(len(store)))]


def test_arrow_holds_the_store(store, tmp_path):
    """A vector beside another passage's text, or a scale left out of int8."""
    told = []
    export_arrow(store, tmp_path / "out", lambda *done: told.append(done))
    table = pa.ipc.open_file(tmp_path / "out" / "memories.arrow").read_all()
    assert table.schema.field("vector").type == pa.list_(pa.float32(), 48)
    vectors = np.stack(table["vector"].to_numpy())
    np.testing.assert_array_equal(vectors.reshape(-1, 3, 16), store.memories(np.arange(8)))
    assert table.drop_columns("vector").to_pylist() == rows_of(store)
    assert told == [(3, 8), (6, 8), (8, 8)]


def test_numpy_holds_the_store(store, tmp_path):
    """As for Arrow, and for rows of the two files that are not the same."""
    export_numpy(store, tmp_path / "out")
    memories = np.load(tmp_path / "out" / "memories.npy", mmap_mode="r")
    assert memories.dtype == np.float32
    np.testing.assert_array_equal(memories, store.memories(np.arange(8)))
    assert pq.read_table(tmp_path / "out" / "passages.parquet").to_pylist() == rows_of(store)


def test_empty_store(tmp_path):
    """A store whose last document was deleted: a crash, or files that do not open."""
    writer = StoreWriter(tmp_path / "store", SETTINGS)
    writer.commit([add(writer, {"ada": 2})[0]], [])
    StoreWriter(tmp_path / "store").commit([], ["ada"])
    store = MemoryStore.open(tmp_path / "store")
    export_arrow(store, tmp_path / "a")
    export_numpy(store, tmp_path / "n")
    assert pa.ipc.open_file(tmp_path / "a" / "memories.arrow").read_all().num_rows == 0
    assert np.load(tmp_path / "n" / "memories.npy").shape == (0, 3, 16)
    assert pq.read_table(tmp_path / "n" / "passages.parquet").num_rows == 0


def test_commands(store, tmp_path, monkeypatch):
    """The command that the guide names does not do what it says, or writes over another export."""
    for what, name in (("arrow", "memories.arrow"), ("numpy", "memories.npy")):
        monkeypatch.setattr(sys, "argv", ["convert", what, store.location, str(tmp_path / what)])
        with pytest.raises(SystemExit) as stopped:
            run_command(convert.main)
        assert stopped.value.code == 0 and (tmp_path / what / name).stat().st_size > 0
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        export_arrow(store, tmp_path / "numpy")
