"""The folder format of BEIR: `queries.jsonl`, `corpus.jsonl` and `qrels/SPLIT.tsv`.

Lines of the first two are `{"_id": ..., "title": ..., "text": ...}` (a title is optional); a table's columns are
query id, document id and a whole number, under a heading. A number above zero says that the document is relevant.
"""

from collections.abc import Iterator
from pathlib import Path

from clara_jax.errors import fail
from clara_jax.scoring.candidates import Candidate
from clara_jax.scoring.fields import read_lines, read_objects


def is_beir(path: Path) -> bool:
    """Whether the path is a folder, or a table in a folder `qrels`: what is then expected is BEIR."""
    return path.is_dir() or (path.suffix == ".tsv" and path.parent.name == "qrels")


def qrels_file(path: Path) -> Path:
    """The table of relevant documents: `path` itself, or of a folder `qrels/test.tsv`, else its only one."""
    if path.suffix == ".tsv":
        return path
    missing = [name for name in ("queries.jsonl", "corpus.jsonl", "qrels") if not (path / name).exists()]
    if missing:
        fail(f"folder {path} has no {' and no '.join(missing)}", "A folder must have them, as BEIR's do")
    tables = sorted((path / "qrels").glob("*.tsv"))
    test = [table for table in tables if table.name == "test.tsv"] or tables
    if len(test) != 1:
        found = ", ".join(table.name for table in tables) or "no .tsv file"
        fail(f"{path / 'qrels'} holds {found}", "Name the one to use as FOLDER/qrels/SPLIT.tsv")
    return test[0]


def read_relevant(table: Path) -> dict[str, dict[str, str]]:
    """For each question of the table the relevant documents' ids, each with the place that names it."""
    relevant: dict[str, dict[str, str]] = {}
    for where, line in read_lines(table):
        columns = line.split("\t")
        if columns == ["query-id", "corpus-id", "score"]:
            continue
        if len(columns) != 3 or not columns[0] or not columns[1]:
            fail(f"{where}: {line[:60]!r}", "It must be query id, document id and score, with tabs between")
        query, document, score = columns
        if not score.strip().removeprefix("-").isdecimal():
            fail(f"{where}: the score is {score!r}", "It must be a whole number")
        known = relevant.setdefault(query, {})
        if int(score) > 0:
            known[document] = where
    return relevant


def read_queries(folder: Path) -> dict[str, str]:
    """The text of each question of `queries.jsonl`."""
    queries: dict[str, str] = {}
    for fields in read_objects(folder / "queries.jsonl"):
        key = fields.identity(("_id",)) or fields.refuse("_id", "a text")
        if key in queries:
            fail(f"{fields.where}: id {key!r} has occurred before", "Give each question an id of its own")
        queries[key] = fields.text("text")
    return queries


def read_corpus(folder: Path) -> Iterator[Candidate]:
    """The documents of `corpus.jsonl`, one after another, with the ids that the file gives."""
    seen = set()
    for fields in read_objects(folder / "corpus.jsonl"):
        key = fields.identity(("_id",)) or fields.refuse("_id", "a text")
        if key in seen:
            fail(f"{fields.where}: id {key!r} has occurred before", "Give each document an id of its own")
        seen.add(key)
        yield Candidate(key, fields.optional("title"), fields.text("text", may_be_blank=True))
