"""Base weights in and out: bit for bit, and a clear line for every kind of damage."""

import json
import struct

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers

from clara_jax.errors import UserError
from clara_jax.interop.base import load_base, save_base
from clara_jax.interop.safetensors import INDEX, TensorSpec, open_file, open_folder, write_file, write_folder
from clara_jax.models.config import read_decoder_config

CONFIG = {
    "vocab_size": 24,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "Mistral": {},
    "Llama": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "Qwen2": {},
    "Qwen3": {"head_dim": 6},
    "Phi3": {"original_max_position_embeddings": 64},
}


def save_model(folder, family="Mistral", dtype=torch.float32, **options):
    """A random model saved by transformers; its tensors by name."""
    config = getattr(transformers, f"{family}Config")(**(CONFIG | FAMILIES[family]))
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn(tensor.shape))
    model.to(dtype).save_pretrained(folder, **options)
    return read_by_library(folder)


def read_by_library(folder):
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in safetensors.torch.load_file(path).items()}


def assert_same_bits(got, expected):
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        assert torch.equal(bits(got[name]), bits(tensor)), name


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_base_round_trip_is_bit_exact(family, dtype, tmp_path):
    """A model converted and written back would not be the model any more."""
    source, target = tmp_path / "in", tmp_path / "out"
    # bfloat16 comes in shards of two kilobytes, and leaves in shards of one.
    sharded = {"max_shard_size": 2000} if dtype == torch.bfloat16 else {}
    expected = save_model(source, family, dtype, **sharded)
    assert (source / INDEX).exists() == bool(sharded)
    config = read_decoder_config(source)
    steps = []
    base = load_base(source, config, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(i + 1, len(expected)) for i in range(len(expected))]
    target.mkdir()
    save_base(target, base, config, shard_bytes=1000 if sharded else 5_000_000_000)
    assert_same_bits(read_by_library(target), expected)
    if sharded:
        index = json.loads((target / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
        assert set(index["weight_map"]) == set(expected)
        # Whoever reads the folder next may be transformers itself.
        (target / "config.json").write_text((source / "config.json").read_text())
        model = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=dtype)
        assert_same_bits({k: v for k, v in model.state_dict().items() if k in expected}, expected)


def test_special_values_survive(tmp_path):
    """Infinities, NaN payloads and denormals of a damaged or unusual model would be quietly repaired."""
    save_model(tmp_path)
    words = np.arange(0, 2**16, 683, dtype=np.uint16).view(ml_dtypes.bfloat16)
    tensors = read_by_library(tmp_path)
    tensors = {name: t.to(torch.bfloat16) for name, t in tensors.items()}
    name = "model.layers.1.mlp.down_proj.weight"  # [8, 12]
    tensors[name] = torch.from_numpy(words.view(np.uint16)[:96].reshape(8, 12).copy()).view(torch.bfloat16)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    config = read_decoder_config(tmp_path)
    (tmp_path / "out").mkdir()
    save_base(tmp_path / "out", load_base(tmp_path, config), config)
    assert_same_bits(read_by_library(tmp_path / "out"), tensors)


ALL_TYPES = {
    "f64": np.arange(3, dtype=np.float64),
    "f32": np.float32([[1, -2], [np.inf, 1e-40]]),
    "f16": np.float16([0.1]),
    "bf16": np.asarray([[[1.5]]], ml_dtypes.bfloat16),
    "i64": np.int64([2**62, -1]),
    "i32": np.int32([-5]),
    "u8": np.uint8([255]),
    "bool": np.asarray([True, False]),
    "empty": np.zeros((0, 4), np.float32),
    "scalar": np.asarray(2.5, np.float32),
}


def test_reads_what_the_library_writes(tmp_path):
    """Files of other tools would be read wrongly."""
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(ALL_TYPES, path, {"format": "pt", "note": "metadata is not a tensor"})
    entries = open_file(path)
    assert set(entries) == set(ALL_TYPES)
    for name, expected in ALL_TYPES.items():
        got = entries[name].read()
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape), name
        assert got.tobytes() == expected.tobytes(), name


def test_the_library_reads_what_we_write(tmp_path):
    """Exported weights could not be opened elsewhere."""
    path = tmp_path / "x.safetensors"
    # A transposed view: the data must be written in the order of its shape, not of its memory.
    tensors = ALL_TYPES | {"view": np.arange(6, dtype=np.float32).reshape(2, 3).T}
    write_file(path, [TensorSpec(n, t.dtype, t.shape) for n, t in tensors.items()], iter(tensors.values()))
    got = safetensors.numpy.load_file(path)
    assert set(got) == set(tensors)
    for name, expected in tensors.items():
        assert (got[name].dtype, got[name].shape) == (expected.dtype, expected.shape), name
        assert got[name].tobytes() == np.ascontiguousarray(expected).tobytes(), name
    # transformers refuses a file whose metadata does not say which framework wrote it.
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_hold_at_most_the_size_asked_for(tmp_path):
    """A shard over the limit defeats the memory bound of every later reader."""
    specs = [TensorSpec(f"t{i}", np.dtype(np.float32), (i + 1,)) for i in range(6)]
    write_folder(tmp_path, specs, (np.full(s.shape, i, np.float32) for i, s in enumerate(specs)), shard_bytes=24)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert [sum(e.nbytes for e in open_file(shard).values()) for shard in shards] == [24, 16, 20, 24]
    assert [path.name for path in shards] == [f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)]
    entries = open_folder(tmp_path)
    assert all((entries[f"t{i}"].read() == i).all() for i in range(6))


def rewrite(folder, change):
    """Rewrite the folder's tensors as `change` leaves them."""
    tensors = read_by_library(folder)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def load(folder):
    return load_base(folder, read_decoder_config(folder))


GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(GATE), rf"missing.*'{GATE}'"),
        (lambda t: t.update({"model.layers.2.mlp.gate_proj.weight": torch.zeros(2)}), r"not part.*layers\.2\.mlp"),
        (lambda t: t.update({GATE: t[GATE][:, 1:].contiguous()}), rf"'{GATE}'.*\[12, 7\].*\[12, 8\]"),
        (lambda t: t.update({GATE: t[GATE].T.contiguous()}), rf"'{GATE}'.*\[8, 12\].*\[12, 8\]"),
        (lambda t: t.update({GATE: t[GATE].to(torch.int32)}), rf"'{GATE}'.*int32"),
        (lambda t: t.update({GATE: t[GATE] > 0}), rf"'{GATE}'.*bool"),
        (lambda t: t.update({GATE: t[GATE].to(torch.float8_e4m3fn)}), rf"'{GATE}'.*F8_E4M3"),
        (lambda t: t.update({GATE: t[GATE].to(torch.bfloat16)}), "gate_proj.*bfloat16.*float32"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, named, tmp_path):
    """A wrong or quantised model would be loaded half, or fail with a shape error from inside JAX."""
    save_model(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(UserError, match=named) as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_buffers_that_no_model_reads_are_ignored(tmp_path):
    """Llama 2's own files carry rotary_emb.inv_freq, and tied models a second head: both must load."""
    save_model(tmp_path, "Llama")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    rewrite(tmp_path, lambda t: t.update(extra | {"lm_head.weight": torch.zeros(24, 8)}))
    assert set(load(tmp_path)) == {"embed", "layers", "final_norm"}


def test_named_dtype_unites_mixed_types(tmp_path):
    """The error about mixed types says to name a dtype: that has to help."""
    save_model(tmp_path)
    rewrite(tmp_path, lambda t: t.update({GATE: t[GATE].to(torch.bfloat16)}))
    base = load_base(tmp_path, read_decoder_config(tmp_path), jnp.bfloat16)
    assert base["layers"]["gate_proj"]["kernel"].dtype == jnp.bfloat16


def test_truncated_anywhere(tmp_path):
    """An interrupted download would be read as zeros, or end in a traceback."""
    save_model(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for size in (0, 5, 8, 9, header - 1, header, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"model\.safetensors.*Download"):
            load(tmp_path)


HEADERS = {
    "not JSON": b"\x80garbage{",
    "a list": b"[1]",
    "a number": b"7",
    "a tensor that is a number": b'{"a": 1}',
    "no dtype": b'{"a": {"shape": [1], "data_offsets": [0, 4]}}',
    "no shape": b'{"a": {"dtype": "F32", "data_offsets": [0, 4]}}',
    "no offsets": b'{"a": {"dtype": "F32", "shape": [1]}}',
    "one offset": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
    "texts for offsets": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}',
    "texts for a shape": b'{"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}',
    "a shape of fractions": b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
    "a list for a type": b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
    "negative sizes": b'{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
    "an offset before the data": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
    "deep nesting": b'{"a": ' + b"[" * 100_000,
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_header_garbage(header, tmp_path):
    """A damaged file would end in a KeyError or TypeError that names no file, or read other bytes as weights."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(UserError, match=r"model\.safetensors"):
        open_folder(tmp_path)


def test_missing_shard(tmp_path):
    """A shard that was not downloaded would show as missing layers, without the file's name."""
    save_model(tmp_path, max_shard_size=2000)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} does not exist"):
        load(tmp_path)


def test_no_weights_at_all(tmp_path):
    """A folder of .bin weights is a common mistake."""
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        open_folder(tmp_path)


def test_index_that_names_absent_tensors(tmp_path):
    """An index of another model would be believed."""
    save_model(tmp_path, max_shard_size=2000)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["model.layers.7.mlp.up_proj.weight"] = next(iter(index["weight_map"].values()))
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json.*layers\.7"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "\ufffd{"])
def test_index_garbage(text, tmp_path):
    """A damaged index would end in a traceback."""
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(UserError, match=r"index\.json"):
        open_folder(tmp_path)
