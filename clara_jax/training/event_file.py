"""TensorBoard's file of a run: scalars and text, written without TensorFlow.

The records are written by TensorBoard's own `RecordWriter` into a plain file. Its `EventFileWriter` is left out: that
one writes from a thread of its own, where a full disk shows as a traceback on the terminal, and what fails while it
closes is lost. A step's record is about a kilobyte, so that there is nothing to wait for.
"""

import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text import metadata as text_plugin
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_tensor_proto


class EventFile:
    """A new event file; every method raises `OSError` where the disk does."""

    def __init__(self, folder: Path, first_step: int):
        """Open a file in `folder` for the steps after `first_step`; TensorBoard then forgets older ones of those."""
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("wb")
        self._records = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        self._add(step=first_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write_scalars(self, step: int, values: Mapping[str, float | int]) -> None:
        """Add `values` to their curves."""
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._add(step=step, summary=summary)

    def write_text(self, step: int, name: str, markdown: str) -> None:
        """Add `markdown` to the Text tab, under `name`."""
        metadata = text_plugin.create_summary_metadata(display_name=None, description=None)
        tensor = make_tensor_proto(np.array(markdown.encode(), dtype=object))
        self._add(step=step, summary=Summary(value=[Summary.Value(tag=name, metadata=metadata, tensor=tensor)]))

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close."""
        self._file.close()

    def _add(self, **fields: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **fields).SerializeToString())


def code_block(text: str, language: str = "") -> str:
    """`text` as Markdown that shows it letter by letter, whatever it contains."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
