"""`python -m clara_jax.ask --model RUN --store DIR ["question"]`: answers from memory stores, with their sources.

Without a question it asks for one after the other (or reads one per line where standard input is not a terminal). With
`--questions FILE` it answers those of a file, a JSON object {"question": ..., "id": ...} a line.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from clara_jax.clara import Answer, Clara
from clara_jax.command_line import one_line
from clara_jax.errors import UserError, fail, run_command
from clara_jax.generation import Sampling
from clara_jax.progress import CountProgress
from clara_jax.retrieval.first_pass import FirstPass
from clara_jax.retrieval.index import MemoryIndex
from clara_jax.scoring.fields import read_objects

_TOGETHER = 16  # questions of a file that are answered in one batch
_SHOWN = 200  # characters of a passage that are shown


def main() -> None:
    """Parse, open the stores, and answer."""
    arguments = _parser().parse_args()
    if arguments.k is not None and arguments.k < 1:
        fail(f"--k is {arguments.k}", "Give at least 1")
    if arguments.question is not None and arguments.questions is not None:
        fail("both a question and --questions are given", "Give one of them")
    sampling = Sampling(arguments.temperature, arguments.top_p, arguments.seed)
    clara = Clara.from_pretrained(arguments.model, base=arguments.base, dtype=arguments.dtype)
    index = clara.open_stores(
        *arguments.store,
        device_bytes=arguments.device_bytes,
        first_pass=arguments.first_pass,
        factory=arguments.factory,
    )

    def answer(questions: list[str], **watch: Any) -> list[Answer]:
        return clara.answer(questions, index, arguments.k, arguments.max_new_tokens, sampling, **watch)

    if arguments.questions is not None:
        with _writing(arguments.out) as say:
            _answer_file(arguments.questions, answer, say)
    elif arguments.question is not None:
        _show(answer([arguments.question])[0], arguments.json)
    else:
        _converse(answer, index, arguments.json)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m clara_jax.ask", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question", nargs="?", help="what to answer; without it, questions are read one by one")
    parser.add_argument(
        "--model", required=True, help="directory of a run or curriculum, checkpoints/STEP, or CLaRa folder"
    )
    parser.add_argument(
        "--store", required=True, action="append", help="memory store that this model's compressor has made; repeatable"
    )
    parser.add_argument("--base", help="base model to use instead of the one that the model names")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute type (default: by the device)")
    parser.add_argument("--k", type=int, help="memories to answer from (default: the model's own number)")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="longest answer in tokens (128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the best token each time")
    parser.add_argument("--top_p", type=float, default=1.0, help="sample among the likeliest tokens of this share (1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling (0)")
    parser.add_argument("--device_bytes", type=int, help="keep the memories on the devices if they need no more")
    parser.add_argument("--first_pass", type=int, help="score only so many candidates, found by FAISS (default: all)")
    parser.add_argument("--factory", default="Flat", help="FAISS index that finds the candidates, e.g. HNSW32 (Flat)")
    parser.add_argument("--json", action="store_true", help="print JSON, an object a line")
    parser.add_argument("--questions", type=Path, help="file of questions to answer")
    parser.add_argument("--out", type=Path, help="file for their answers as JSONL (default: standard output)")
    return parser


def _answer_file(path: Path, answer: Any, say: Callable[[str], None]) -> None:
    entries = list(read_objects(path))
    if not entries:
        fail(f"{path} holds no question", 'Give a JSON object a line: {"question": ...}')
    questions = [entry.text("question") for entry in entries]
    ids = [entry.identity(("id", "_id", "qid")) or str(number) for number, entry in enumerate(entries, 1)]
    progress = CountProgress(len(questions), "question")
    for start in range(0, len(questions), _TOGETHER):
        rows = slice(start, start + _TOGETHER)
        for name, found in zip(ids[rows], answer(questions[rows]), strict=True):
            say(json.dumps({"id": name, **dataclasses.asdict(found)}, ensure_ascii=False))
        progress.advance(len(ids[rows]))
    progress.close()


@contextlib.contextmanager
def _writing(path: Path | None) -> Iterator[Callable[[str], None]]:
    """Takes lines, for standard output or for a file that gets its name when all are written."""
    if path is None:
        yield functools.partial(print, flush=True)
        return
    partial = path.with_name(path.name + ".partial")
    try:
        file = partial.open("w", encoding="utf-8")
    except OSError as error:
        fail(f"{path} cannot be written ({error.strerror})", "Name a file in a folder that you can write to")
    with file:
        yield functools.partial(print, file=file, flush=True)
    partial.replace(path)


def _converse(answer: Any, index: MemoryIndex | FirstPass, as_json: bool) -> None:
    """Answer what is asked, a line at a time, until the end of input; mistakes do not end it."""
    terminal = sys.stdin.isatty()
    if terminal:
        print(f"{len(index)} memories. Ask a question (Ctrl-D ends).")
    while True:
        try:
            question = input("> " if terminal else "")
        except EOFError:
            return
        if not question.strip():
            continue
        try:
            if as_json or not terminal:
                _show(answer([question])[0], as_json)
            else:
                found = answer([question], on_text=lambda _, piece: print(piece, end="", flush=True))[0]
                print()
                _show_sources(found)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


def _show(answer: Answer, as_json: bool) -> None:
    if as_json:
        print(json.dumps(dataclasses.asdict(answer), ensure_ascii=False), flush=True)
        return
    print(answer.text)
    _show_sources(answer)


def _show_sources(answer: Answer) -> None:
    for rank, source in enumerate(answer.sources, 1):
        title = f"{source.title}, " if source.title else ""
        print(f"\n{rank}. {source.score:.4f}  {title}{source.document} [{source.start}:{source.end}] of {source.store}")
        print(f"   {one_line(source.text, _SHOWN)}")
    if answer.question_cut:
        print("\nThe question is longer than a document may be: its end played no part in the search.")
    print("\n" + ", ".join(f"{part} {seconds:.2f} s" for part, seconds in answer.seconds.items()), flush=True)


if __name__ == "__main__":
    run_command(main)
