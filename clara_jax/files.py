"""Writing folders so that a half-written one is never seen."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from clara_jax.errors import fail


@contextlib.contextmanager
def new_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, which gets the name `path` only when the block ends without an error.

    Refuses a `path` that exists and is not empty, or, with `replace`, removes what is there just before.
    """
    if not replace and path.exists() and (not path.is_dir() or any(path.iterdir())):
        fail(f"{path} exists and is not an empty folder", "Name another output folder, or remove it")
    partial = path.with_name(path.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        fail(f"{partial} cannot be made ({error.strerror})", "Name a folder in a place that you can write to")
    try:
        yield partial
        if path.exists():
            shutil.rmtree(path) if replace else path.rmdir()
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def replace_text(path: Path, text: str) -> None:
    """`replace_bytes` of a text in UTF-8."""
    replace_bytes(path, text.encode("utf-8"))


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it is the old one or the new one at any moment. Raises `OSError`."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
