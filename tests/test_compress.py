"""The compress command as a user starts it: killed at any moment, in several processes, with wrong options."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from clara_jax.retrieval.store import MemoryStore
from tests.conftest import FIXTURES, ROOT
from tests.test_indexing import assert_same_store, corpus, everything, words
from tests.training.commands import free_port

MODEL = FIXTURES / "mistral_window" / "ckpt_stage2"
KILLS = 20


def start(folder, store, *options):
    """The command, its output in a pipe, on one device; programs that were compiled before are not compiled again."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "clara_jax.compress", "--store", str(store), *options],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(folder, store, *options):
    """Its exit status and all that it says."""
    process = start(folder, store, *options)
    said, _ = process.communicate(timeout=300)
    return process.returncode, said


def test_killed_at_any_moment(tmp_path):
    """If this broke, a preempted machine would leave a store with documents twice, without some, or half written."""
    names = corpus(tmp_path / "c.jsonl", [(f"d{n}", f"Title {n}", words(n, 12 + n % 50)) for n in range(120)])
    options = ("--model", str(MODEL), "--corpus", *names, "--segment", "2", "--batch_tokens", "256", "--overlap", "8")
    status, said = run(tmp_path, tmp_path / "whole", *options)
    assert status == 0, said
    store, rng, moments = tmp_path / "killed", random.Random(0), []
    for _ in range(KILLS):
        process = start(tmp_path, store, *options)
        before, segments = markers(store), rng.randrange(4)
        while process.poll() is None and markers(store) < before + segments:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        moments.append(markers(store) - before)
        assert not (store / "manifest.json").exists() or markers(store) == 60  # nothing counts before all is there
    assert sum(moments) > KILLS / 2, moments  # most kills came while segments were written
    status, said = run(tmp_path, store, *options)
    assert status == 0 and "An earlier run had compressed" in said, said
    assert_same_store(tmp_path / "whole", store)
    ids = MemoryStore.open(store).documents["id"].to_pylist()
    assert sorted(ids) == sorted(f"d{n}" for n in range(120))


def markers(store):
    """Complete segments of a store, committed or not."""
    return len(list(store.glob("segments/*/segment.json")))


def test_several_processes_make_one_store(tmp_path):
    """If this broke, a pod could not share the work, or would commit a part of it."""
    names = corpus(tmp_path / "c.jsonl", [(f"d{n}", "", words(n)) for n in range(11)])
    options = ("--model", str(MODEL), "--corpus", *names, "--segment", "2", "--overlap", "8")
    status, said = run(tmp_path, tmp_path / "one", *options)
    assert status == 0, said
    cluster = (f"--cluster.coordinator=localhost:{free_port()}", "--cluster.processes=2")
    processes = [start(tmp_path, tmp_path / "two", *options, *cluster, f"--cluster.process={n}") for n in range(2)]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "Documents: 11 new." in said[0] and "Documents" not in said[1]
    assert_same_store(tmp_path / "one", tmp_path / "two")


def test_delete_and_check(tmp_path):
    """Deleting needs no model; a store that is damaged is named as such, with status 2."""
    names = corpus(tmp_path / "c.jsonl", [("a", "", "One."), ("b", "", "Two.")])
    store = tmp_path / "store"
    assert run(tmp_path, store, "--model", str(MODEL), "--corpus", *names)[0] == 0
    assert run(tmp_path, store, "--delete", "a") == (
        0,
        f"Deleted 1 documents. {store} holds 1 documents in 1 passages.\n",
    )
    assert run(tmp_path, store, "--delete", "a", "b") == (
        2,
        f"error: {store} has no document 'a' (1 such). Give ids of its documents.\n",
    )
    assert run(tmp_path, store, "--check") == (0, f"{store} is whole: 1 documents in 1 passages.\n")
    next(store.glob("segments/*/passages.parquet")).unlink()
    status, said = run(tmp_path, store, "--check")
    assert status == 2 and "passages.parquet is missing" in said and "1 of 1 segments" in said
    status, said = run(tmp_path, store, "--model", str(MODEL), "--corpus", *names, "--repair")
    assert status == 0 and {p.document for p in everything(store)[0]} == {"a", "b"}, said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "nothing to compress"),
        (("--corpus", "x.jsonl"), "nothing to compress"),
        (("--model", "nowhere", "--corpus", "x.jsonl"), "nowhere is neither a run directory"),
        (("--model", str(MODEL), "--corpus", "x.jsonl"), "x.jsonl"),
        (("--model", str(MODEL), "--corpus", "x.jsonl", "--memory_type", "int4"), "memory_type"),
        (("--model", str(MODEL), "--corpus", "x.jsonl", "--segments", "4"), "segments"),
        (("--model", str(MODEL), "--corpus", "x.jsonl", "--mesh.data", "7"), "mesh: data 7"),
        (("--delete", "a"), "holds no memory store"),
        (("--check",), "holds no memory store"),
    ],
)
def test_wrong_options_are_one_line(tmp_path, options, message):
    """A mistake is named on one line, with status 2."""
    status, said = run(tmp_path, tmp_path / "store", *options)
    lines = [line for line in said.splitlines() if line]
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], said
