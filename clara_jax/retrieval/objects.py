"""Named objects in a local folder or a bucket, each written whole or not at all: what a memory store is made of.

TensorStore's key-value stores do the work: a local write goes to a temporary file that is renamed, one in a bucket is
a single put.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tensorstore as ts

from clara_jax.errors import fail

_FIX = "Check the address, your credentials and the free space"
_CONTEXT = ts.Context()  # one for all, or no two would see the same memory:// (a bucket for tests)


class Objects:
    """The objects below one location: a path, or a URL such as `gs://bucket/folder` or `s3://bucket/folder`.

    Credentials are found as Google's and Amazon's own tools find them; `AWS_ENDPOINT_URL` names another S3 server.
    """

    def __init__(self, location: str | Path):
        """Open; nothing is read or written yet. Raises `UserError` for a URL of an unknown kind."""
        text = str(location)
        self.location = text
        try:
            self._store = ts.KvStore.open(_spec(text), context=_CONTEXT).result()
        except ValueError as error:
            fail(
                f"{text} cannot be opened ({_first_line(error)})", "Give a folder, or a URL of the kind gs:// or s3://"
            )

    def read(self, name: str) -> bytes | None:
        """The object's bytes; none if there is no such object. Raises `UserError` where reading fails."""
        return self.read_version(name)[0]

    def read_version(self, name: str) -> tuple[bytes | None, bytes]:
        """The object's bytes (none if there is no such object), and a token of this version for `replace`."""
        try:
            found = self._store.read(name).result()
        except ValueError as error:
            fail(f"{self.path(name)} cannot be read ({_first_line(error)})", _FIX)
        return bytes(found.value) if found.state == "value" else None, bytes(found.stamp.generation)

    def write(self, name: str, content: bytes) -> None:
        """Write or replace the object. Raises `UserError` where writing fails."""
        try:
            self._store.write(name, content).result()
        except ValueError as error:
            fail(f"{self.path(name)} cannot be written ({_first_line(error)})", _FIX)

    def replace(self, name: str, content: bytes, version: bytes) -> bool:
        """Write the object if it is still the one that `version` was read of; False where it is another by now."""
        try:
            return bool(self._store.write(name, content, if_equal=version).result().generation)
        except ValueError as error:
            fail(f"{self.path(name)} cannot be written ({_first_line(error)})", _FIX)

    def names(self, folder: str = "") -> list[str]:
        """Names of all objects whose name begins with `folder` (empty, or ending in a slash), sorted."""
        try:
            return sorted(folder + name.decode() for name in (self._store / folder).list().result())
        except ValueError as error:
            fail(f"{self.path(folder)} cannot be listed ({_first_line(error)})", _FIX)

    def delete(self, names: Iterable[str]) -> None:
        """Delete the objects."""
        for name in names:
            try:
                self._store.write(name, None).result()
            except ValueError as error:
                fail(f"{self.path(name)} cannot be deleted ({_first_line(error)})", _FIX)

    def array(self, folder: str, **settings: Any) -> ts.TensorStore:
        """The zarr v3 array in `folder` (ending in a slash), opened with the `settings` of a TensorStore spec.

        Raises `ValueError`, as all that is done with it does.
        """
        kvstore = (self._store / folder).spec().to_json()
        return ts.open({"driver": "zarr3", "kvstore": kvstore, **settings}, context=_CONTEXT).result()

    def path(self, name: str) -> str:
        """The object's address, for messages."""
        return f"{self.location.rstrip('/')}/{name}"


def _spec(location: str) -> str | dict[str, str]:
    """The location as TensorStore takes it."""
    if not re.match(r"[a-z0-9]+://", location):
        folder = Path(location).expanduser().absolute()
        if folder.exists() and not folder.is_dir():
            fail(f"{location} is a file, not a folder", "Name a folder")
        return {"driver": "file", "path": f"{folder}/"}
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    if location.startswith("s3://") and endpoint:  # a server other than Amazon's, which TensorStore does not ask for
        bucket, _, path = location.removeprefix("s3://").partition("/")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        path = f"{path.rstrip('/')}/" if path else ""
        return {"driver": "s3", "bucket": bucket, "path": path, "endpoint": endpoint, "aws_region": region}
    return f"{location.rstrip('/')}/"


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[0].split(" [tensorstore_spec")[0].split())[:300]
