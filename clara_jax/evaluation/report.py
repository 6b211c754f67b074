"""What an evaluation leaves in its folder: numbers, a row per question, TREC files, and a report to read."""

import base64
import dataclasses
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clara_jax.evaluation.run import Evaluated, Intervals, Means
from clara_jax.scoring.trec import escaped, write_qrels, write_run

EXAMPLES = 5
READING = (
    "All systems answer from the same documents. memory is the model; text and truncated_text are the base model "
    "without adapters, with the documents' text in the prompt, whole or cut to as many tokens as a memory has. If "
    "memory is not clearly above no_memory and wrong_memory, its memories carry little of what is asked."
)


def write_report(folder: Path, evaluated: Evaluated, settings: dict[str, Any]) -> None:
    """Write results.json, questions.jsonl, runs/*.trec, qrels.txt, report.md and report.html into `folder`."""
    results = {
        "answers": evaluated.answers,
        "retrieval": evaluated.retrieval,
        "intervals": {"answers": evaluated.answer_intervals, "retrieval": evaluated.retrieval_intervals},
        "counts": evaluated.counts,
        "seconds": sum(evaluated.seconds.values()),
        "seconds_of": evaluated.seconds,
        "settings": settings,
    }
    _write(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in evaluated.rows]
    _write(folder / "questions.jsonl", "".join(rows))
    (folder / "runs").mkdir()
    for name, rankings in evaluated.rankings.items():
        words = {escaped(q): [(escaped(key), score) for key, score in ranking] for q, ranking in rankings.items()}
        write_run(folder / "runs" / f"{name}.trec", words, name)
    relevant = {escaped(q): [escaped(key) for key in keys] for q, keys in evaluated.relevant.items()}
    write_qrels(folder / "qrels.txt", relevant)
    sections = _sections(evaluated, settings)
    _write(folder / "report.md", _markdown(sections))
    _write(folder / "report.html", _html(sections, _plots(evaluated)))


def summary(evaluated: Evaluated) -> str:
    """The tables of means, for the terminal."""
    tables = [_table("system", evaluated.answers), _table("retriever", evaluated.retrieval)]
    return "\n\n".join(_plain(table) for table in tables if len(table) > 1)


Table = list[list[str]]


@dataclasses.dataclass(frozen=True)
class _Section:
    title: str
    text: str = ""
    table: Table = dataclasses.field(default_factory=list)


def _sections(evaluated: Evaluated, settings: dict[str, Any]) -> list[_Section]:
    counts = [["what", "number"], *([name.replace("_", " "), str(n)] for name, n in evaluated.counts.items())]
    answers = _table("system", evaluated.answers, evaluated.answer_intervals)
    by_retriever = _table("", evaluated.retrieval, evaluated.retrieval_intervals)
    retrieval = [list(column) for column in zip(*by_retriever, strict=True)]  # there are more scores than retrievers
    described = [["setting", "value"], *([name, str(value)] for name, value in settings.items())]
    times = [["part", "seconds"], *([name, f"{value:.1f}"] for name, value in evaluated.seconds.items())]
    some = (row for row in evaluated.rows if row["answers"])
    examples = [
        _Section(
            row["question"],
            "Accepted: " + " / ".join(row["accepted"]),
            [["system", "answer", "EM"], *([s, a["text"], f"{a['em']:.0f}"] for s, a in row["answers"].items())],
        )
        for row, _ in zip(some, range(EXAMPLES), strict=False)
    ]
    sections = [_Section("Answers", READING, answers), _Section("Retrieval", "", retrieval), *examples]
    sections += [_Section("Counts", "", counts), _Section("Settings", "", described), _Section("Time", "", times)]
    return [section for section in sections if len(section.table) > 1]


def _table(head: str, means: Means, intervals: Intervals | None = None) -> Table:
    if not means:
        return []
    names = list(next(iter(means.values())))

    def cell(name: str, metric: str) -> str:
        if intervals is None:
            return f"{100 * means[name][metric]:.1f}"
        low, high = intervals[name][metric]
        return f"{100 * means[name][metric]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    return [[head, *names], *([name, *(cell(name, metric) for metric in names)] for name in means)]


def _plain(table: Table) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(w) if n == 0 else cell.rjust(w) for n, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
    return "\n".join(lines)


def _markdown(sections: Sequence[_Section]) -> str:
    parts = ["# Evaluation\n\nScores in percent, with 95 % bootstrap intervals over the questions.\n"]
    for section in sections:
        rows = ["| " + " | ".join(" ".join(c.replace("|", r"\|").split()) for c in row) + " |" for row in section.table]
        rows.insert(1, "|" + "---|" * len(section.table[0]))
        parts.append(f"## {' '.join(section.title.split())}\n\n{section.text}\n\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{border-bottom:1px solid #ddd;padding:.25em .8em;text-align:left}"
    "th{background:#f4f4f4}h2{margin-top:1.6em;font-size:1.15em}img{max-width:100%}p{max-width:48em}"
)


def _html(sections: Sequence[_Section], plots: Sequence[tuple[str, str]]) -> str:
    body = ["<h1>Evaluation</h1><p>Scores in percent, with 95&nbsp;% bootstrap intervals over the questions.</p>"]
    body += [f'<img alt="{html.escape(name)}" src="data:image/png;base64,{content}">' for name, content in plots]
    for section in sections:
        body.append(f"<h2>{html.escape(section.title)}</h2>")
        if section.text:
            body.append(f"<p>{html.escape(section.text)}</p>")
        head, *rows = section.table
        body.append("<table><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>")
        body += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
        body.append("</table>")
    title = "<!doctype html><html lang='en'><meta charset='utf-8'><title>Evaluation</title>"
    return f"{title}<style>{_STYLE}</style><body>{''.join(body)}</body></html>\n"


def _plots(evaluated: Evaluated) -> list[tuple[str, str]]:
    """(what it shows, PNG in base64) of answers and of retrieval."""
    from matplotlib.figure import Figure

    plots = []
    for title, means, intervals in (
        ("answers", evaluated.answers, evaluated.answer_intervals),
        ("retrieval", evaluated.retrieval, evaluated.retrieval_intervals),
    ):
        if not means:
            continue
        metrics = list(next(iter(means.values())))
        figure = Figure(figsize=(10, 3), layout="constrained")
        axes = figure.add_subplot()
        width = 0.8 / len(means)
        for number, (name, scores) in enumerate(means.items()):
            places = [place + (number + 0.5) * width - 0.4 for place in range(len(metrics))]
            heights = [100 * scores[metric] for metric in metrics]
            spans = [
                [max(0.0, h - 100 * intervals[name][m][0]) for h, m in zip(heights, metrics, strict=True)],
                [max(0.0, 100 * intervals[name][m][1] - h) for h, m in zip(heights, metrics, strict=True)],
            ]
            axes.bar(places, heights, width * 0.92, yerr=spans, label=name, error_kw={"lw": 1, "ecolor": "#555"})
        axes.set_xticks(range(len(metrics)), metrics, fontsize="small")
        axes.set_ylabel("percent")
        axes.set_ylim(0, 100)
        axes.set_title(title)
        axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
        axes.spines[["top", "right"]].set_visible(False)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=130)
        plots.append((title, base64.b64encode(content.getvalue()).decode()))
    return plots


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
