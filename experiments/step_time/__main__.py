"""`python -m experiments.step_time --json FILE`: a training step beside the PyTorch reference's, in turn.

A Mistral-shaped model of random weights (hidden 512, 8 layers, 8 heads of which 4 are for keys and values, float32)
with three random adapters of rank 16 on every linear layer is trained on the same records in the same batches by

- PyTorch + PEFT, as the reference: `experiments.step_time.baseline`, which lists where it departs from it;
- PyTorch + PEFT, lean: the same without its padding, and without a head over documents and questions;
- clara_jax: the step of `clara_jax.train` on the batches that it would read;
- clara_jax with one thing taken away each (see `experiments.step_time.ours`), and with all of them.

Before any time is taken, loss and norm of the gradient of the first step without dropout must agree: of both PyTorch
sides, of clara_jax, and of the last side, from which all is taken away. Repeat n is a step on batch n by every side,
back and forth; printed are medians and quartiles over the repeats, medians of the ratios of single batches, and in
brackets the latter of processor time. Batches are the first ones of that shape which is in the middle of a run's
batches by its columns, so that little is compiled, off the clock. They lie on the device; making one takes the host as
long as is printed, and a run does that ahead. The store of memories is filled before the first step, which is printed
by itself. Without `--corpus` documents are generated (see `experiments.step_time.records`); it takes files of this
project's records (.jsonl) or in SQuAD's format (.json). On the CPU the process is held to `--threads` cores.

On a GPU (`--device cuda --dtype bfloat16 --attention cudnn --hidden 4096 --layers 32 --heads 32
--kv-heads 8 --mlp 14336 --no-ablations` is Mistral 7B but for its vocabulary) both sides' weights lie on it at once.
"""

import argparse
import functools
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
import torch

from clara_jax.config import ModelConfig
from clara_jax.data.pipeline import Counted
from clara_jax.data.tokenizer import ClaraTokenizer
from clara_jax.errors import run_command
from clara_jax.models.attention import AttentionName
from clara_jax.models.remat import RematPolicy
from clara_jax.training.stages import StageName
from experiments.compression.models import DOC_MAX_LENGTH, RATE, Shape
from experiments.step_time.baseline import Baseline, add_adapters, load_checkpoint, make_batch
from experiments.step_time.models import Made, make_model
from experiments.step_time.ours import LAYOUTS, Layout, Ours, Stage, make_stage, step_without_dropout
from experiments.step_time.records import generate_topics, read_topics, records_of, write_records

REFERENCE, LEAN = "PyTorch + PEFT, as the reference", "PyTorch + PEFT, lean"
# Of losses and norms of gradients, relative; what is wrong in kind is off by far more.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
STAGES: tuple[StageName, ...] = ("compression_pretraining", "end_to_end")

_LOOKED_AT = 64  # batches of a run

Step = Callable[[], Any]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--stage", choices=[*STAGES, "both"], default="both")
    parser.add_argument("--corpus", type=Path, nargs="+", default=[], help="files of records (default: generated)")
    parser.add_argument("--records", type=int, default=48, help="at most so many for each stage")
    parser.add_argument("--documents", type=int, default=4, help="batch of compression_pretraining")
    parser.add_argument("--questions", type=int, default=1, help="batch of end_to_end, 20 candidates each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32")
    parser.add_argument("--attention", choices=get_args(AttentionName), default="xla", help="clara_jax's")
    parser.add_argument("--remat", choices=get_args(RematPolicy), default="lora", help="clara_jax's")
    parser.add_argument("--no-ablations", action="store_true", help="leave out what has a thing taken away")
    for name, size in vars(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    parser.add_argument("--no-agreement", action="store_true", help="do not compare the first step (a program less)")
    options = parser.parse_args()
    _hold(options.device, options.threads)
    topics = read_topics(options.corpus) if options.corpus else generate_topics()
    if not options.corpus:
        print("documents are generated: words and lengths are drawn at random")
    stages = STAGES if options.stage == "both" else (options.stage,)
    records = {stage: records_of(topics, stage, options.records) for stage in stages}
    texts = [document for of_stage in records.values() for record in of_stage for document in record["docs"]]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        shape = Shape(**{name: getattr(options, name) for name in vars(Shape())})
        made = make_model(Path(folder), texts, shape, options.dtype, options.device)
        model = add_adapters(made, ClaraTokenizer(made.base, DOC_MAX_LENGTH // RATE).special)
        for stage in stages:
            (Path(folder) / stage).mkdir()
            found[stage] = _measure(stage, records[stage], Path(folder) / stage, made, model, options)
    if options.json:
        settings = {key: value for key, value in vars(options).items() if key not in ("json", "corpus")}
        settings["generated"] = not options.corpus
        options.json.write_text(json.dumps({"settings": settings, **found}, indent=1) + "\n", encoding="utf-8")


def _measure(
    stage: StageName, records: list[dict[str, Any]], folder: Path, made: Made, model: Any, options: argparse.Namespace
) -> dict[str, Any]:
    """One stage's figures, printed; `model` is PyTorch's, with adapters."""
    print(f"\n## {stage}\n", flush=True)
    write_records(folder / "records.jsonl", records)
    batch_size = options.documents if stage == "compression_pretraining" else options.questions
    speed = ModelConfig(
        str(made.base), str(made.checkpoint), dtype=options.dtype, attention=options.attention, remat=options.remat
    )
    ours = make_stage(folder, speed, folder / "records.jsonl", stage, batch_size, print)
    layouts = LAYOUTS[stage][:1] if options.no_ablations else LAYOUTS[stage]
    special = ours.run.model.tokenizer.special
    load_checkpoint(model, made)
    baselines = {
        name: Baseline(model, stage, special.num_memory, lean) for name, lean in ((REFERENCE, False), (LEAN, True))
    }
    batches, making = _batches(ours, options.repeats)
    agreement = None if options.no_agreement else _agree(ours, layouts, baselines, batches[0], options)
    steps = Ours(ours.run, ours.run.step)
    of_batches, columns = [], []
    for counted in batches:
        sides, sizes = _sides(ours, steps, layouts, baselines, counted, options.device)
        of_batches.append(sides)
        columns.append(sizes)
    first = {name: _timed(step)[0] for name, step in of_batches[0].items()}  # compiles
    times = _in_turn(of_batches)
    figures = _figures(times, columns, first)
    _print_table(figures)
    print(f"\nThe host makes a batch in {1e3 * making:.0f} ms.")
    found = {"agreement": agreement, "making_seconds": making, "figures": figures}
    if ours.store and not options.no_ablations:
        found["store"] = _store_figures(ours, times, batch_size)
    return found


def _batches(ours: Stage, number: int) -> tuple[list[Counted], float]:
    """So many batches of the shape in the middle (over again, if they are few), and the seconds of making one."""
    started = time.perf_counter()
    made = [ours.batches[i] for i in range(_LOOKED_AT)]
    seconds = (time.perf_counter() - started) / len(made)
    by_columns = sorted(made, key=lambda counted: [shape.columns for shape in ours.shapes(counted)])
    middle = ours.shapes(by_columns[len(made) // 2])
    chosen = [counted for counted in made if ours.shapes(counted) == middle]
    print(
        f"{len(chosen)} of {len(made)} batches have the shape of the one in the middle: {middle[0]}; its rows have "
        f"{middle[0].columns} columns, those of all batches {np.mean([counted.shape.columns for counted in made]):.0f}"
    )
    return list(itertools.islice(itertools.cycle(chosen), number)), seconds


def _agree(
    ours: Stage,
    layouts: Sequence[Layout],
    baselines: dict[str, Baseline],
    counted: Counted,
    options: argparse.Namespace,
) -> dict[str, tuple[float, float]]:
    """Loss and gradient norm of the sides' first steps without dropout. Raises `SystemExit` where they differ."""
    found, samples = {}, ours.samples(counted)
    for name, baseline in baselines.items():
        batch = make_batch(samples, ours.run.model.tokenizer.special, options.device, baseline.lean)
        found[name] = baseline.loss_and_gradient_norm(batch)
    step = step_without_dropout(ours.run)
    for layout in dict.fromkeys((layouts[0], layouts[-1])):
        found[layout.name] = Ours(ours.run, step)(ours.lay_out(counted, layout)[0])
    expected = np.array(found[REFERENCE])
    worst = max(np.abs(np.array(values) / expected - 1).max() for values in found.values())
    loss, norm = expected
    print(f"first step without dropout: loss {loss:.6f}, gradient norm {norm:.6f}, largest difference {worst:.1e}")
    if not worst < TOLERANCE[options.dtype]:
        raise SystemExit(f"the sides compute different things: {found}")
    return found


def _sides(
    ours: Stage,
    steps: Ours,
    layouts: Sequence[Layout],
    baselines: dict[str, Baseline],
    counted: Counted,
    device: str,
) -> tuple[dict[str, Step], dict[str, int]]:
    """Every side's step on one batch, and the columns that it computes."""
    sides: dict[str, Step] = {}
    columns = {}
    for name, baseline in baselines.items():
        batch = make_batch(ours.samples(counted), ours.run.model.tokenizer.special, device, baseline.lean)
        sides[name], columns[name] = functools.partial(baseline.step, batch), batch.columns
    for layout in layouts:
        laid_out, columns[layout.name] = ours.lay_out(counted, layout)
        sides[layout.name] = functools.partial(steps, laid_out)
    return sides, columns


def _in_turn(of_batches: list[dict[str, Step]]) -> dict[str, np.ndarray]:
    """Each side's seconds on every batch, [batch, (wall, processor)]; the order of the sides turns round each time."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in of_batches[0]}
    for number, sides in enumerate(of_batches):
        for name in list(sides) if number % 2 == 0 else reversed(sides):
            times[name].append(_timed(sides[name]))
    return {name: np.array(taken) for name, taken in times.items()}


def _timed(step: Step) -> tuple[float, float]:
    wall, used = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - used


def _figures(
    times: dict[str, np.ndarray], columns: list[dict[str, int]], first: dict[str, float]
) -> list[dict[str, Any]]:
    ours = next(name for name in times if name not in (REFERENCE, LEAN))
    figures = []
    for name, taken in times.items():
        figure: dict[str, Any] = {"side": name, "columns": float(np.median([sizes[name] for sizes in columns]))}
        figure |= {"seconds": taken[:, 0].tolist(), "processor_seconds": taken[:, 1].tolist()}
        figure |= {"median": float(np.median(taken[:, 0])), "first_step_seconds": first[name]}
        figure |= {f"quartile_{q}": float(np.quantile(taken[:, 0], q / 4)) for q in (1, 3)}
        for key, over, under in (
            ("times_reference", times[REFERENCE], taken),
            ("times_lean", times[LEAN], taken),
            ("over_ours", taken, times[ours]),
        ):
            figure[key], figure[f"{key}_processor"] = np.median(over / under, axis=0).tolist()
        figures.append(figure)
    return figures


def _print_table(figures: list[dict[str, Any]]) -> None:
    print("\n| step | columns | seconds (quartiles) | times the reference | times lean | seconds over clara_jax's |")
    print("|---|---|---|---|---|---|")
    for figure in figures:
        print(
            "| {side} | {columns:.0f} | {median:.3f} ({quartile_1:.3f} to {quartile_3:.3f}) | "
            "{times_reference:.2f} ({times_reference_processor:.2f}) | {times_lean:.2f} ({times_lean_processor:.2f}) | "
            "{over_ours:.2f} ({over_ours_processor:.2f}) |".format_map(figure),
            flush=True,
        )


def _store_figures(ours: Stage, times: dict[str, np.ndarray], batch_size: int) -> dict[str, float]:
    assert ours.store is not None
    layouts = LAYOUTS["end_to_end"]
    saved = {layout: np.median(times[layout.name][:, 0]) for layout in layouts}
    in_step = next(layout for layout in layouts if layout.in_step and not layout.padded)
    paid = ours.store.seconds / (saved[in_step] - saved[layouts[0]])
    each = ours.store.seconds / ours.store.documents
    print(
        f"The store was filled with {ours.store.documents} documents in {ours.store.seconds:.1f} s with compiling, "
        f"{1e3 * each:.0f} ms each; {paid:.0f} steps ({paid * batch_size:.0f} questions) save as much."
    )
    return {"documents": ours.store.documents, "seconds": ours.store.seconds, "steps_to_pay": paid}


def _hold(device: str, threads: int) -> None:
    """Both libraries on one device: on the CPU to so many cores, on a GPU without taking all of its memory at once."""
    jax.config.update("jax_platforms", device)
    if device == "cuda":
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        return
    torch.set_num_threads(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


if __name__ == "__main__":
    run_command(main)
