"""Plain text and Markdown files as documents: which there are in a folder, their text and their title."""

import os
import re
from pathlib import Path

from clara_jax.data.records import FieldError

TEXT_SUFFIXES = (".txt", ".md")
_HEADING = re.compile(r"^#{1,6}[ \t]+(\S[^\r\n]*)", re.MULTILINE)


def is_text(path: Path) -> bool:
    """Whether the name is that of a plain text or Markdown file."""
    return path.suffix.lower() in TEXT_SUFFIXES


def list_files(folder: Path) -> list[Path]:
    """All files below `folder`, by path. Files and folders whose names start with a dot are left out."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(found)


def read_text(path: Path) -> str:
    """The file's text with its line ends as they stand, without a byte order mark.

    Raises `FieldError` with the line if it is not UTF-8, or with the reason if it cannot be read.
    """
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise FieldError(f"line {line} is not UTF-8") from None
    except OSError as error:
        raise FieldError(f"the file cannot be read ({error.strerror})") from None


def title_of(path: Path, text: str) -> str:
    """A Markdown file's first heading, else the file's name without its ending."""
    heading = _HEADING.search(text) if path.suffix.lower() == ".md" else None
    return heading[1].rstrip("# \t") if heading else path.stem
