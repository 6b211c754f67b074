"""PyTorch's file format: read without PyTorch as PyTorch reads it, and nothing in a file is ever run."""

import io
import os
import pickle
import random
import shutil
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from clara_jax.errors import UserError
from clara_jax.interop.pth import read_pth, write_pth

WHOLE = torch.arange(24, dtype=torch.float32).reshape(4, 6) - 7.5
STATES = {
    "float types": {
        "f32": WHOLE,
        "bf16": WHOLE.to(torch.bfloat16) / 3,
        "f16": WHOLE.to(torch.float16) / 3,
        "f64": WHOLE.to(torch.float64) / 3,
        "special": torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 1e-40]),
    },
    "views": {
        "transposed": WHOLE.T,
        "strided": WHOLE[1::2, ::3],
        "expanded": WHOLE[:1].expand(5, 6),
        "tail": WHOLE[3, 4:],
        "shared": WHOLE,  # several of these lie in one storage
        "permuted": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
    },
    "parameters": {"p": torch.nn.Parameter(WHOLE), "frozen": torch.nn.Parameter(WHOLE.T, requires_grad=False)},
    "empty and scalar": {
        "none": torch.zeros(0),
        "rows": torch.zeros(0, 3),
        "columns": torch.zeros(3, 0),
        "scalar": torch.tensor(2.5),
        "end": WHOLE[4:],
    },
    "nested": {"adapter": {"deep": {"w": WHOLE}}, "ordered": OrderedDict(b=WHOLE, a=WHOLE + 1), "nothing": {}},
    "module": torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3)).state_dict(),
    "integers": {"ids": torch.tensor([2**40, -1]), "small": torch.tensor([3], dtype=torch.int32), "b": WHOLE > 0},
}


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def assert_equal(got, expected):
    assert isinstance(got, dict) == isinstance(expected, dict)
    if isinstance(expected, dict):
        assert list(got) == list(expected)
        for key in expected:
            assert_equal(got[key], expected[key])
    else:
        expected = as_numpy(expected)
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert got.tobytes() == expected.tobytes()


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_reads_what_torch_reads(state, tmp_path):
    """A published checkpoint would load with other numbers than in PyTorch."""
    path = tmp_path / "x.pth"
    torch.save(state, path)
    got = read_pth(path)
    assert_equal(got, torch.load(path, weights_only=True))
    # Memory of its own: changing one tensor must not change another that shared its storage.
    first = next((value for value in got.values() if isinstance(value, np.ndarray) and value.size), None)
    assert first is None or (first.flags.owndata and first.flags.writeable)


def test_torch_reads_what_we_write(tmp_path):
    """The reference could not load a checkpoint that was trained here."""
    rng = np.random.default_rng(0)
    state = {
        "f32": rng.normal(size=(3, 4)).astype(np.float32),
        "bf16": rng.normal(size=(3, 4)).astype(ml_dtypes.bfloat16),
        "f16": rng.normal(size=5).astype(np.float16),
        "view": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "scalar": np.asarray(1.5, np.float32),
        "empty": np.zeros((0, 2), np.float32),
        "nested": {"deep": {"w": np.ones(2, np.float32)}},
    }
    write_pth(tmp_path / "x.pth", state)
    loaded = torch.load(tmp_path / "x.pth", weights_only=True)
    assert loaded["bf16"].dtype == torch.bfloat16

    def compare(got, expected):
        if isinstance(expected, dict):
            assert list(got) == list(expected)
            for key in expected:
                compare(got[key], expected[key])
        else:
            assert (as_numpy(got).dtype, tuple(got.shape)) == (expected.dtype, expected.shape)
            assert as_numpy(got).tobytes() == np.ascontiguousarray(expected).tobytes()

    compare(loaded, state)
    assert_equal(read_pth(tmp_path / "x.pth"), loaded)


class _Payload:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class _Object:
    """Any class of a training script."""


def save_pickle(path, content: bytes, storages: dict[str, bytes] | None = None):
    """A zip file as torch.save lays it out, with a pickle of our own."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)


def test_a_pickle_that_runs_code_is_refused_unrun(tmp_path):
    """Opening a downloaded checkpoint would hand the machine to whoever wrote it."""
    path, witness = tmp_path / "x.pth", tmp_path / "witness"
    for payload in (
        _Payload(os.system, f"touch {witness}"),
        _Payload(eval, f"open({str(witness)!r}, 'w').close()"),
        _Payload(getattr, "os", "system"),
    ):
        torch.save({"w": WHOLE, "bad": payload}, path)
        with pytest.raises(UserError, match="not only tensors"):
            read_pth(path)
        save_pickle(path, pickle.dumps(payload, protocol=0))
        with pytest.raises(UserError, match=r"x\.pth"):
            read_pth(path)
    assert not witness.exists()


@pytest.mark.parametrize(
    "value",
    [_Object(), 3, 1.5, "text", None, [WHOLE], (WHOLE,), {1, 2}, np.ones(2), torch.float32, torch.Size([2])],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_a_tensor_is_refused(value, tmp_path):
    """A training state (step counts, optimizers, configs) would be taken for weights."""
    torch.save({"w": WHOLE, "deep": {"other": value}}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth"):
        read_pth(tmp_path / "x.pth")


def test_the_wrong_value_is_named(tmp_path):
    """The message has to say which entry to remove."""
    torch.save({"w": WHOLE, "deep": {"step": 3}}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth\['deep'\]\['step'\] is a int"):
        read_pth(tmp_path / "x.pth")


@pytest.mark.parametrize("content", [WHOLE, 3, [WHOLE], None], ids=lambda value: type(value).__name__)
def test_a_file_that_is_no_dict_is_refused(content, tmp_path):
    """A single saved tensor would fail much later, as an array that has no keys."""
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth"):
        read_pth(tmp_path / "x.pth")


@pytest.mark.parametrize("key", [1, None, 2.5])
def test_keys_that_are_no_names_are_refused(key, tmp_path):
    """Optimizer states have numbers for keys; sorting them among names would end in a TypeError."""
    torch.save({key: WHOLE, "w": WHOLE}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth"):
        read_pth(tmp_path / "x.pth")


def tensor_pickle(offset, size, stride, elements=4):
    """A pickle that asks for a tensor of a storage of four numbers."""
    storage = ("storage", torch.FloatStorage, "0", "cpu", elements)

    class _Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return storage if value is storage else None

    file = io.BytesIO()
    call = _Payload(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())
    _Pickler(file, 2).dump({"w": call})
    return file.getvalue()


@pytest.mark.parametrize(
    ("offset", "size", "stride", "stored"),
    [
        (0, (5,), (1,), 4),
        (3, (2,), (1,), 4),
        (0, (2, 2), (4, 1), 4),
        (-1, (1,), (1,), 4),
        (3, (2,), (-1,), 4),
        (0, (-2,), (1,), 4),
        (0, (2,), (1, 1), 4),
        (0, (1,), (1,), 0),  # one element of an empty storage
        (0, (), (), 0),
        (0, (1,), (1,), 0.5),  # half an element
    ],
)
def test_a_tensor_past_its_storage_is_refused(offset, size, stride, stored, tmp_path):
    """A forged file would read the program's own memory into the weights, or crash the interpreter."""
    save_pickle(tmp_path / "x.pth", tensor_pickle(offset, size, stride), {"0": bytes(int(stored * 4))})
    with pytest.raises(UserError, match=r"x\.pth"):
        read_pth(tmp_path / "x.pth")


def test_forged_pickle_is_read_where_it_is_honest(tmp_path):
    """The refusals above would prove nothing if no pickle of this kind could be read."""
    data = np.arange(4, dtype=np.float32)
    save_pickle(tmp_path / "x.pth", tensor_pickle(1, (2,), (2,)), {"0": data.tobytes()})
    np.testing.assert_array_equal(read_pth(tmp_path / "x.pth")["w"], [1.0, 3.0])


def test_truncated_anywhere(tmp_path):
    """An interrupted copy would end in a traceback."""
    path = tmp_path / "x.pth"
    torch.save({"w": WHOLE}, path)
    whole = path.read_bytes()
    for size in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"x\.pth"):
            read_pth(path)


def test_flipped_bytes_are_refused_or_harmless(tmp_path):
    """A damaged disk would change weights without a word."""
    path = tmp_path / "x.pth"
    state = {"w": WHOLE, "nested": {"b": WHOLE.to(torch.bfloat16)}}
    torch.save(state, path)
    whole, rng, refused = path.read_bytes(), random.Random(0), 0
    data = whole.index(as_numpy(WHOLE).tobytes())
    places = [*range(data, data + WHOLE.nbytes), *rng.sample(range(len(whole)), 300)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert_equal(read_pth(path), state)  # a byte that nobody reads (dates, padding)
        except UserError as error:
            assert "x.pth" in str(error)
            refused += 1
        else:
            assert not data <= place < data + WHOLE.nbytes
    assert refused >= WHOLE.nbytes


@pytest.mark.parametrize(
    "make",
    [
        lambda path: torch.save({"w": WHOLE}, path, _use_new_zipfile_serialization=False),
        lambda path: path.write_bytes(b"not a checkpoint"),
        lambda path: zipfile.ZipFile(path, "w").close(),
        lambda path: None,
        lambda path: path.mkdir(),
    ],
    ids=["legacy", "text", "empty zip", "missing", "folder"],
)
def test_files_of_another_kind(make, tmp_path):
    """A checkpoint from before PyTorch 1.6, or another file altogether, would end in a traceback."""
    make(tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth"):
        read_pth(tmp_path / "x.pth")


def test_safetensors_saved_as_pth(tmp_path):
    """Renamed files happen."""
    safetensors.torch.save_file({"w": WHOLE}, tmp_path / "x.safetensors")
    shutil.move(tmp_path / "x.safetensors", tmp_path / "x.pth")
    with pytest.raises(UserError, match="not a PyTorch zip file"):
        read_pth(tmp_path / "x.pth")
