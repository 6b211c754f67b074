"""`python -m clara_jax.inspect WHAT --model RUN ...`: what memories hold.

lens    questions or documents  ->  the tokens that their memory tokens decode to (paper, Fig. 4)
map     corpus                  ->  mean memory and mean document states in one plane, as PNG and CSV
"""

import argparse
import dataclasses
import json
from pathlib import Path

from clara_jax.errors import fail, require_package, run_command
from clara_jax.inspection import plane
from clara_jax.inspection.lens import Lens, Position, logit_lens
from clara_jax.training.runs import load_model

_TOPICS = 20  # topic words that are printed
_WIDTH = 16  # columns of a decoded token in the table


def main() -> None:
    """Parse, look, and print or draw."""
    arguments = _parser().parse_args()
    {"lens": _lens, "map": _map}[arguments.what](arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m clara_jax.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="what", required=True)
    lens = commands.add_parser("lens", help="memory tokens through the output head")
    lens.add_argument("questions", nargs="*", help="questions, read by the query reasoner")
    lens.add_argument("--document", nargs="+", default=[], help="documents, read by the compressor")
    lens.add_argument("--document_file", nargs="+", default=[], type=Path, help="text files, one document each")
    lens.add_argument("--top", type=int, default=5, help="decoded tokens per memory token (5)")
    lens.add_argument("--all_tokens", action="store_true", help="also the tokens of the text itself")
    lens.add_argument("--json", action="store_true", help="a JSON object a line instead of tables")
    drawn = commands.add_parser("map", help="mean memory and document states in one plane")
    drawn.add_argument("--corpus", nargs="+", required=True, help="files, folders, or hub ids of data sets")
    drawn.add_argument("--out", type=Path, required=True, help="PNG file to write; a CSV file goes beside it")
    drawn.add_argument("--method", choices=("pca", "tsne"), default="pca", help="the projection (pca)")
    drawn.add_argument("--documents", type=int, default=500, help="the most documents to take, from the first on (500)")
    drawn.add_argument("--seed", type=int, default=0, help="of t-SNE (0)")
    for command in (lens, drawn):
        command.add_argument(
            "--model", required=True, help="directory of a run or curriculum, checkpoints/STEP, or CLaRa folder"
        )
        command.add_argument("--base", help="base model to use instead of the one that the model names")
        command.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute type (default: by the device)")
    return parser


def _lens(arguments: argparse.Namespace) -> None:
    documents = [*arguments.document, *map(_read, arguments.document_file)]
    if not arguments.questions and not documents:
        fail("there is nothing to look at", "Give a question, --document or --document_file")
    if arguments.top < 1:
        fail(f"--top is {arguments.top}", "Give at least 1")
    if not all(text.strip() for text in [*arguments.questions, *documents]):
        fail("a question or document is blank", "Give some text")
    loaded = load_model(Path(arguments.model), arguments.base, arguments.dtype)
    found: list[Lens] = []
    if arguments.questions:
        found += logit_lens(loaded, "query_reasoner", arguments.questions, arguments.top, arguments.all_tokens)
    if documents:
        found += logit_lens(loaded, "compressor", documents, arguments.top, arguments.all_tokens)
    limit = loaded.checkpoint.doc_max_length
    for lens in found:
        print(json.dumps(dataclasses.asdict(lens), ensure_ascii=False) if arguments.json else _table(lens, limit))


def _table(lens: Lens, limit: int) -> str:
    shown = " ".join(lens.text.split())
    lines = [f"{lens.role}: {shown if len(shown) <= 100 else shown[:97] + '...'}"]
    if lens.cut:
        lines.append(f"(cut: only the first {limit} tokens were read)")
    lines += [_row(position) for position in [*lens.tokens, *lens.memory]]
    topics = ", ".join(f"{topic.word} ({topic.count})" for topic in lens.topics[:_TOPICS])
    lines.append(f"topics, and among the top of how many of {len(lens.memory)} memory tokens: {topics or 'none'}")
    return "\n".join([*lines, ""])


def _row(position: Position) -> str:
    cells = [f"{token:<{_WIDTH}} {p:6.1%}" for token, p in position.decoded]
    return f"  {position.token:<{_WIDTH}} | " + " | ".join(cells)


def _map(arguments: argparse.Namespace) -> None:
    out = arguments.out
    if out.suffix != ".png" or not out.parent.is_dir() or out.is_dir():
        fail(f"--out {out} is not a .png file in a folder that exists", "Name one")
    require_package("matplotlib", "a map", "clara_jax[evaluate]")
    loaded = load_model(Path(arguments.model), arguments.base, arguments.dtype)
    means = plane.mean_states(loaded, arguments.corpus, arguments.documents)
    flat = plane.project(means, arguments.method, arguments.seed)
    name = {"pca": "PCA", "tsne": "t-SNE"}[arguments.method]
    table = out.with_suffix(".csv")
    try:
        plane.draw(flat, f"{arguments.model}: {name} of {len(means.ids)} documents", out)
        plane.write_coordinates(means, flat, table)
    except OSError as error:
        fail(f"{error.filename or out} cannot be written ({error.strerror})", "Name a file that you can write")
    if means.cut:
        print(f"{means.cut} documents are longer than the limit: of them the first passage was read.")
    print(f"{len(means.ids)} documents: mean cosine {means.cosine():.4f}, mean distance {means.distance():.4g}.")
    if flat.explained is not None:
        print(f"The plane explains {sum(flat.explained):.1%} of the variance.")
    print(f"Wrote {out} and {table}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path} cannot be read as text ({error})", "Name a UTF-8 text file")


if __name__ == "__main__":
    run_command(main)
