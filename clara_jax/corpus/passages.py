"""Documents longer than the compressor reads, cut into passages on sentence borders.

A document that fits is one passage, unchanged. Of any other, a passage takes as many whole sentences as fit, and
begins with the last sentences of the one before, as many as the overlap allows. A sentence that does not fit is cut
between words, and where there are none, anywhere. Every character but white space is in some passage.

The compressor reads a passage as the training data has it: the document's title, a newline, the text.
"""

import dataclasses
import itertools
import re
import sys
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from clara_jax.corpus.documents import Document
from clara_jax.corpus.sentences import sentence_starts
from clara_jax.data.tokenizer import LAYOUT_TOKENS, ClaraTokenizer
from clara_jax.errors import fail

# The text is tokenised in blocks, so that a document of any length needs little memory.
_BLOCK = 1 << 16
_BLOCKS = 16
# A passage by itself can have a few tokens more than its share of the document's. Leaving some free makes it rare that
# one has to be cut again; passages are planned and checked so many at a time.
_SLACK = 2
_PLANNED = 64
_VISIBLE = re.compile(r"\S")

Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Passage:
    """Passage number `index` (from 0) of a document: its characters `start` to `end` (exclusive), which are `text`.

    `title` is the document's, cut if it is very long (see `cut_passages`).
    """

    document: str
    index: int
    start: int
    end: int
    title: str
    text: str

    @property
    def titled_text(self) -> str:
        """What the compressor reads."""
        return titled(self.title, self.text)


def titled(title: str, text: str) -> str:
    """Title, newline, text; the text alone if there is no title."""
    return f"{title}\n{text}" if title else text


def count_tokens(tokenizer: ClaraTokenizer, texts: list[str]) -> list[int]:
    """Tokens of each text as the compressor counts them against `doc_max_length`: in its layout, that not counted."""
    return [len(ids) - LAYOUT_TOKENS for ids, _ in tokenizer.encode_passages(texts, sys.maxsize)]


def cut_passages(document: Document, tokenizer: ClaraTokenizer, limit: int, overlap: int) -> list[Passage]:
    """The document's passages, each of at most `limit` tokens with its title; none if the text is white space.

    `overlap` is the most tokens of whole sentences that a passage repeats from the one before. A title longer than half
    of `limit` is cut to that. Raises `UserError` for an overlap that leaves no room, or a limit so small that not
    even a single character fits.
    """
    if not 0 <= overlap < limit:
        fail(f"passages of {limit} tokens that repeat {overlap}", "Choose an overlap from 0 to less than the limit")
    text, title = document.text, document.title.strip()
    if not _VISIBLE.search(text):
        return []
    title_tokens = count_tokens(tokenizer, [titled(title, "")])[0] if title else 0
    if title_tokens > limit // 2:
        plan = _Plan(title, token_starts(tokenizer, title), np.array([], np.int64), 0)
        title = title[: plan.last_word(0, plan.reach(0, limit // 2))].rstrip()
        title_tokens = limit // 2
    plan = _Plan(text, token_starts(tokenizer, text), sentence_starts(text), overlap)
    spans = [(0, len(text))]
    near = title_tokens + len(plan.tokens) <= limit + _SLACK
    if not near or count_tokens(tokenizer, [titled(title, text)])[0] > limit:
        spans = _fitting(plan, tokenizer, document, title, limit, limit - title_tokens - _SLACK)
    return [Passage(document.id, n, start, end, title, text[start:end]) for n, (start, end) in enumerate(spans)]


def token_starts(tokenizer: ClaraTokenizer, text: str) -> Int[np.ndarray, " tokens"]:
    """The character at which each token begins, ascending; off by a token at most every 65,536 characters."""
    offsets = range(0, len(text), _BLOCK)
    parts = [np.array([], np.int64)]
    for first in range(0, len(offsets), _BLOCKS):
        some = offsets[first : first + _BLOCKS]
        encoded = tokenizer.backend(
            [text[offset : offset + _BLOCK] for offset in some],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        parts += [
            np.fromiter((start for start, _ in spans), np.int64, len(spans)) + offset
            for offset, spans in zip(some, encoded["offset_mapping"], strict=True)
        ]
    return np.maximum.accumulate(np.concatenate(parts))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A text, where its tokens begin, where its sentences begin (and the last ends), and the overlap in tokens."""

    text: str
    tokens: Int[np.ndarray, " tokens"]
    sentences: Int[np.ndarray, " sentences"]
    overlap: int

    def count(self, span: Span) -> int:
        """Tokens that begin in the span."""
        first, last = np.searchsorted(self.tokens, span)
        return int(last - first)

    def visible(self, position: int) -> int:
        """The first character from `position` on that is not white space."""
        found = _VISIBLE.search(self.text, position)
        return found.start() if found else len(self.text)

    def reach(self, start: int, budget: int) -> int:
        """How far `budget` tokens from `start` go; without a budget, one character."""
        if budget < 1:
            return start + 1
        token = int(np.searchsorted(self.tokens, start)) + budget
        return max(int(self.tokens[token]), start + 1) if token < len(self.tokens) else len(self.text)

    def last_sentence(self, start: int, reach: int) -> int:
        """The end of the last whole sentence up to `reach`, or `start` if there is none."""
        fitting = int(np.searchsorted(self.sentences, self.visible(reach), "right"))
        return max(start, int(self.sentences[fitting - 1])) if fitting else start

    def last_word(self, start: int, reach: int) -> int:
        """The end of the last whole word up to `reach`; `reach` itself if that would leave out more than half."""
        piece = self.text[start:reach]
        if reach == len(self.text) or self.text[reach].isspace() or piece[-1].isspace():
            return reach
        words = piece.rsplit(None, 1)
        return start + len(words[0]) if 2 * len(words[0]) > len(piece) else reach

    def following(self, previous: Span, budget: int) -> Span:
        """The passage after `previous`, in at most `budget` tokens."""
        end_before = previous[1]
        repeated = int(np.searchsorted(self.tokens, end_before)) - self.overlap
        earliest = int(self.tokens[max(repeated, 0)]) if self.overlap else end_before
        first, last = np.searchsorted(self.sentences, (max(earliest, previous[0] + 1), end_before))
        for start in map(int, self.sentences[first:last]):
            end = self.last_sentence(start, self.reach(start, budget))
            if end > end_before:
                return start, end
        start = self.visible(end_before)
        reach = self.reach(start, budget)
        end = self.last_sentence(start, reach)
        return start, end if end > start else self.last_word(start, reach)

    def spans(self, previous: Span, first_budget: int, budget: int) -> Iterator[Span]:
        """The passages after `previous` up to the end of the text."""
        for allowed in itertools.chain([first_budget], itertools.repeat(budget)):
            if self.visible(previous[1]) == len(self.text):
                return
            previous = self.following(previous, allowed)
            yield previous


def _fitting(
    plan: _Plan, tokenizer: ClaraTokenizer, document: Document, title: str, limit: int, budget: int
) -> list[Span]:
    """Spans of passages whose tokens were counted; one that is too long is planned again, and so those after it."""
    accepted, previous, allowed = [], (0, 0), budget
    while planned := list(itertools.islice(plan.spans(previous, allowed, budget), _PLANNED)):
        spans = [(start, start + len(plan.text[start:end].rstrip())) for start, end in planned]
        counts = count_tokens(tokenizer, [titled(title, plan.text[start:end]) for start, end in spans])
        good = next((number for number, count in enumerate(counts) if count > limit), len(spans))
        accepted += spans[:good]
        if good == len(spans):
            previous, allowed = planned[-1], budget
            continue
        start, end = spans[good]
        if end - start == 1:
            fail(
                f"{document.where}: title and character {start} have {counts[good]} tokens, and the limit is {limit}",
                "Use a model with a larger doc_max_length, or shorten the title",
            )
        if good:
            previous, allowed = planned[good - 1], budget
        allowed = min(allowed - 1, plan.count((start, end)) - (counts[good] - limit))
    return accepted
