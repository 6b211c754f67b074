"""`python -m clara_jax.evaluate --model RUN --data FILE --out DIR`: answers and retrieval measured, beside controls.

DIR gets results.json, a line per question in questions.jsonl, TREC files, and a report (report.html, report.md).
"""

import argparse
from pathlib import Path

from clara_jax.clara import Clara
from clara_jax.errors import run_command
from clara_jax.evaluation.pool import POOLS, SETTINGS
from clara_jax.evaluation.report import summary
from clara_jax.evaluation.retrievers import RETRIEVERS
from clara_jax.evaluation.run import EvaluationSettings
from clara_jax.evaluation.systems import SYSTEMS, Decoding
from clara_jax.evaluation.task import EvaluationTask, evaluate_into, prepare_evaluation
from clara_jax.files import new_folder


def main() -> None:
    """Parse, evaluate, and print the means."""
    asked = _parser().parse_args()
    systems = tuple(name.strip() for name in asked.systems.split(","))
    settings = EvaluationSettings(
        asked.setting, asked.pool, asked.k, systems, asked.retriever, asked.dense, asked.rerank, asked.seed
    )
    decoding = Decoding(asked.max_new_tokens, asked.prompt_limit)
    task = EvaluationTask(asked.data, settings, decoding, asked.limit, asked.corpus and tuple(asked.corpus))
    with new_folder(asked.out) as folder:
        prepared = prepare_evaluation(task)
        clara = Clara.from_pretrained(asked.model, base=asked.base, dtype=asked.dtype)
        model = {name: getattr(asked, name) for name in ("model", "base", "dtype")}
        evaluated = evaluate_into(folder, prepared, clara, model)
    print(summary(evaluated))
    print("\n" + ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in evaluated.counts.items()))
    print(f"Report: {asked.out / 'report.html'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m clara_jax.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="directory of a run or curriculum, checkpoints/STEP, or CLaRa folder")
    add("--data", required=True, help="questions: this project's records, HotpotQA, 2Wiki, MuSiQue, NQ, ...")
    add("--out", required=True, type=Path, help="folder for the results; must not exist, or be empty")
    add("--setting", choices=SETTINGS, default="normal", help="which documents the systems get (normal)")
    add("--pool", choices=POOLS, default="own", help="candidates: the question's own, or all of the file's (own)")
    add("--corpus", nargs="+", help="candidates instead: the documents of these sources, as for clara_jax.compress")
    add("--k", type=int, default=5, help="documents given to each question (5)")
    add("--retriever", choices=RETRIEVERS, default="bm25", help="what chooses them in normal and oracle (bm25)")
    add("--systems", default=",".join(SYSTEMS), help="which systems answer, with commas (all)")
    add("--dense", help="sentence-transformers model, scored as a retriever too")
    add("--rerank", type=int, default=0, help="model and dense encoder put BM25's best so many in order (0: all)")
    add("--limit", type=int, help="only the first so many questions")
    add("--max_new_tokens", type=int, default=32, help="longest answer in tokens (32)")
    add("--prompt_limit", type=int, default=4096, help="longest prompt of the systems that read text (4096)")
    add("--seed", type=int, default=0, help="of the wrong documents and the intervals (0)")
    add("--base", help="base model to use instead of the one that the model names")
    add("--dtype", choices=("float32", "bfloat16"), help="compute type (default: by the device)")
    return parser


if __name__ == "__main__":
    run_command(main)
