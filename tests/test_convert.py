"""`python -m clara_jax.convert`: each conversion and its refusals."""

import sys

import jax
import numpy as np
import pytest

from clara_jax import convert
from clara_jax.clara import Clara
from clara_jax.errors import run_command
from clara_jax.interop.base import base_fingerprint
from clara_jax.interop.safetensors import open_folder
from tests.conftest import FIXTURES

CASES = ("llama2_linear", "mistral_window", "phi3_default", "qwen2_bias")


def run(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        run_command(convert.main)
    return int(stopped.value.code or 0)


@pytest.mark.parametrize("case", CASES)
def test_base_to_orbax_and_back_is_bit_exact(monkeypatch, tmp_path, case):
    """A converted base model must hold the very bits of the original, under the same fingerprint."""
    source = FIXTURES / case / "base"
    assert run(monkeypatch, "base", source, tmp_path / "orbax") == 0
    assert base_fingerprint(tmp_path / "orbax") == base_fingerprint(source)
    assert run(monkeypatch, "hf", tmp_path / "orbax", tmp_path / "back") == 0
    before, after = open_folder(source), open_folder(tmp_path / "back")
    assert set(before) == set(after)
    for name in before:
        assert before[name].dtype == after[name].dtype
        assert before[name].read().tobytes() == after[name].read().tobytes(), name
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


def test_converted_base_gives_the_same_answers(monkeypatch, tmp_path):
    """Training and inference take either form of a base model."""
    checkpoint = FIXTURES / "phi3_default" / "ckpt_stage2"
    run(monkeypatch, "base", FIXTURES / "phi3_default" / "base", tmp_path / "orbax")
    plain, converted = (Clara.from_pretrained(checkpoint, base=base) for base in (None, str(tmp_path / "orbax")))
    jax.tree.map(np.testing.assert_array_equal, plain.params, converted.params)


@pytest.mark.parametrize("case", CASES)
def test_checkpoint_round_trip_is_bit_exact(monkeypatch, tmp_path, case):
    """A checkpoint that went through this project is the reference's own, tensor by tensor."""
    import torch

    source = FIXTURES / case / "ckpt_stage2"
    base = FIXTURES / case / "base"
    clara = Clara.from_pretrained(source)
    clara.save_pretrained(tmp_path / "out")
    again = Clara.from_pretrained(tmp_path / "out", base=str(base))
    jax.tree.map(np.testing.assert_array_equal, clara.params, again.params)
    for name in ("adapters.pth", "decoder_first_last_layers.pth"):
        before, after = (torch.load(folder / name, weights_only=True) for folder in (source, tmp_path / "out"))
        flat = {} if name != "adapters.pth" else {(a, k): t for a, ts in after.items() for k, t in ts.items()}
        for key, tensor in flat.items() or after.items():
            original = before[key[0]][key[1]] if isinstance(key, tuple) else before[key]
            assert torch.equal(tensor, original), key


def test_peft_export_writes_one_folder_per_adapter(monkeypatch, tmp_path):
    """PEFT users find each role under its name."""
    assert run(monkeypatch, "peft", FIXTURES / "qwen2_bias" / "ckpt_stage2", tmp_path / "peft") == 0
    found = sorted(path.parent.name for path in (tmp_path / "peft").glob("*/adapter_model.safetensors"))
    assert found == ["compressor", "generator", "query_reasoner"]


def test_refusals_leave_nothing_behind(monkeypatch, tmp_path, capsys):
    """A conversion that fails says why in one line and writes no half folder."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (FIXTURES / "phi3_default" / "base").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    full = tmp_path / "full"
    full.mkdir()
    (full / "note").write_text("mine")
    attempts = [
        ("base", broken, tmp_path / "out", "truncated"),
        ("base", tmp_path / "nowhere", tmp_path / "out", "nowhere"),
        ("peft", tmp_path, tmp_path / "out", "neither a run directory"),
        ("checkpoint", FIXTURES / "phi3_default" / "base", tmp_path / "out", "neither a run directory"),
        ("base", FIXTURES / "phi3_default" / "base", full, "not an empty folder"),
    ]
    for what, source, out, names in attempts:
        assert run(monkeypatch, what, source, out) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(error) == 1 and names in error[0]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "full"]
    assert [path.name for path in full.iterdir()] == ["note"]
