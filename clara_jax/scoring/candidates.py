"""Candidate documents of a question: a title, a text and an id that follows from them."""

import dataclasses
import hashlib


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A document: `id` is unique within its corpus; the title may be empty."""

    id: str
    title: str
    text: str

    @property
    def content(self) -> str:
        """What a model reads: the title, and the text from the next line on; the text alone without a title."""
        return f"{self.title}\n{self.text}" if self.title else self.text


def candidate(title: str, text: str) -> Candidate:
    """The document of that title and text; its id is made of its content (64 bits of SHA-256, in hexadecimal)."""
    content = Candidate("", title, text).content
    return Candidate(hashlib.sha256(content.encode("utf-8")).hexdigest()[:16], title, text)


def candidate_of(content: str) -> Candidate:
    """The document of that content: its first line is the title, unless that is blank or all there is."""
    title, newline, text = content.partition("\n")
    return candidate(title, text) if newline and title.strip() else candidate("", content)
