"""Figures of variants and seeds: a CSV row for each, a Markdown table of means (least to most), pictures."""

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

Row = dict[str, str | float]  # `variant`, `seed`, and a figure for each other column


def write_results(rows: Sequence[Row], out: Path, name: str) -> str:
    """Write `name`.csv, .md and .png into `out`; the Markdown table."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    columns = [column for column in rows[0] if column not in ("variant", "seed")]
    variants = list(dict.fromkeys(str(row["variant"]) for row in rows))
    lines = [f"| | {' | '.join(variants)} |", "|---" * (len(variants) + 1) + "|"]
    for column in columns:
        cells = [_cell(_values(rows, variant, column)) for variant in variants]
        lines.append(f"| {column} | {' | '.join(cells)} |")
    table = "\n".join(lines) + "\n"
    (out / f"{name}.md").write_text(table, encoding="utf-8")
    _draw(rows, variants, columns).savefig(out / f"{name}.png", dpi=120)
    return table


def draw_curves(curves: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], path: Path, over: int) -> None:
    """A panel for each figure, a line for each variant over the steps: `curves[figure][variant]` has a list a seed.

    Lines are means of `over` steps and all seeds, in a shade from the least to the most of the seeds.
    """
    figure = Figure(figsize=(5 * len(curves), 3.6), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False).flat
    for axes, (name, variants) in zip(panels, curves.items(), strict=True):
        for variant, seeds in variants.items():
            means = [[statistics.mean(one[n : n + over]) for n in range(0, len(one), over)] for one in seeds]
            steps = [min(n + over, len(seeds[0])) for n in range(0, len(seeds[0]), over)]
            at_step = list(zip(*means, strict=True))
            (line,) = axes.plot(steps, list(map(statistics.mean, at_step)), label=variant)
            axes.fill_between(
                steps, list(map(min, at_step)), list(map(max, at_step)), color=line.get_color(), alpha=0.12, lw=0
            )
        axes.set(title=name.replace("_", " "), xlabel="step")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)


def in_one_line(row: Row) -> str:
    """The figures of a row with their names, to be printed when they are known."""
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
    )


def _draw(rows: Sequence[Row], variants: Sequence[str], columns: Sequence[str]) -> Figure:
    """A panel for each column, a line of dots for each variant."""
    across = min(4, len(columns))
    down = -(-len(columns) // across)
    figure = Figure(figsize=(3.2 * across + 1, down * (0.3 * len(variants) + 1.2)), layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False, sharey=True).flat)
    for axes, column in zip(panels, columns, strict=False):
        for place, variant in enumerate(variants):
            values = _values(rows, variant, column)
            axes.scatter(values, [place] * len(values), alpha=0.6)
        axes.set(title=column, yticks=range(len(variants)), yticklabels=variants, ylim=(len(variants) - 0.5, -0.5))
        axes.grid(axis="x", alpha=0.3)
    for axes in panels[len(columns) :]:
        axes.remove()
    return figure


def _cell(values: Sequence[float]) -> str:
    mean, least, most = f"{statistics.mean(values):.4g}", f"{min(values):.4g}", f"{max(values):.4g}"
    return mean if least == most else f"{mean} ({least} to {most})"


def _values(rows: Sequence[Row], variant: str, column: str) -> list[float]:
    return [float(row[column]) for row in rows if row["variant"] == variant]
