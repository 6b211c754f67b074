"""PyTorch's zip format (`torch.save`): read without PyTorch, written with it.

A `.pth` file is a zip of a pickle and raw storages. The reader unpickles with a closed list of names, so
that nothing but dicts of tensors can come out of it and nothing can be run by it.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from clara_jax.errors import UserError, fail, require_package

_STORAGES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


def read_pth(path: Path) -> dict[str, Any]:
    """The (nested) dict of tensors in a `.pth` file, as NumPy arrays.

    Raises `UserError` for a file that is missing, damaged, of the format before PyTorch 1.6, or that holds
    anything but dicts of tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            if damaged is not None:
                fail(f"{path} is damaged ('{damaged}' in it fails its checksum)", "Copy the file again")
            entry = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
            if entry is None:
                fail(f"{path} is a zip file without data.pkl", "Give a file written by torch.save")
            root = entry.removesuffix("data.pkl")
            content = _TensorUnpickler(archive, root).load()
    except FileNotFoundError:
        fail(f"{path} does not exist", "Check the checkpoint folder")
    except zipfile.BadZipFile:
        fail(
            f"{path} is not a PyTorch zip file (truncated, or written before PyTorch 1.6)",
            "Copy the file again, or save it with a recent torch.save",
        )
    except _NotATensorError as error:
        fail(f"{path} holds a '{error}', not only tensors", "Save a dict of tensors (a state_dict), nothing else")
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        fail(f"{path} cannot be read ({type(error).__name__}: {error})", "Copy the file again")
    if not isinstance(content, dict):
        fail(f"{path} holds a {_kind(content)}, not a dict of tensors", "Save a state_dict, nothing else")
    _require_tensors(path, content, "")
    return content


class _NotATensorError(Exception):
    """The pickle asks for something that is not on the list of names; the text is its name."""


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")))
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if module == "torch._utils" and name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return lambda data, *_: data
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return name
        raise _NotATensorError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, storage, key, _, _ = pid
        return np.frombuffer(self._archive.read(f"{self._root}data/{key}"), _STORAGES[storage])


def _rebuild_tensor(
    storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> np.ndarray:
    strides = [step * storage.itemsize for step in stride]
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    outside = last >= storage.size and 0 not in size
    if min(*stride, *size, offset, 0) < 0 or offset > storage.size or outside:
        raise ValueError(f"a tensor of shape {size} reaches past its storage of {storage.size} elements")
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides).copy()


def _require_tensors(path: Path, value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                fail(f"{path}{where} has the key {key!r}, not a name", "Save a state_dict, nothing else")
            _require_tensors(path, item, f"{where}['{key}']")
    elif not isinstance(value, np.ndarray):
        fail(f"{path}{where} is a {_kind(value)}, not a tensor", "Save a dict of tensors (a state_dict), nothing else")


def _kind(value: Any) -> str:
    return "tensor" if isinstance(value, np.ndarray) else type(value).__name__


def write_pth(path: Path, tensors: dict[str, Any]) -> None:
    """Write a (nested) dict of arrays with `torch.save`. Needs the extra `convert`."""
    torch = require_package("torch", f"writing {path.name}", "clara_jax[convert]")

    def to_torch(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: to_torch(item) for key, item in value.items()}
        array = np.asarray(value)
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
        return torch.from_numpy(array.copy())

    torch.save(to_torch(tensors), path)
