"""From a run's answers to metrics.json, tables and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from squeezed.evaluation.methods import METHODS, title
from squeezed.evaluation.settings import Record, RunConfig, RunFolder
from squeezed.evaluation.stats import bootstrap
from squeezed.evaluation.suites import find_suite

Metrics = dict[str, Any]


def write_report(folder: Path) -> Metrics:
    """metrics.json, table.md and pictures of what a run has found so far; returns the metrics."""
    run = RunFolder(folder)
    config = run.config()
    records = list(run.records())
    metrics = (text_metrics if config.is_text else answer_metrics)(config, records)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(table(metrics), encoding="utf-8")
    if records:
        from squeezed.evaluation import plots

        plots.draw(metrics, records, folder)
    return metrics


def answer_metrics(config: RunConfig, records: Sequence[Record]) -> Metrics:
    """Scores times 100 by length, row and task, with the realised budget."""
    tasks = _in_order(config.suite, {record["task"] for record in records})
    lengths = {}
    for length in sorted({record["length"] for record in records}):
        rows = {}
        for key, own in _by_row(record for record in records if record["length"] == length):
            scores = {task: [r["score"] for r in own if r["task"] == task] for task in tasks}
            rows[key] = {
                **_about(own),
                "average": bootstrap([values for values in scores.values() if values]).to_dict(100),
                "tasks": {task: bootstrap([values]).to_dict(100) for task, values in scores.items() if values},
                "same_as_full": round(sum(r["same_as_full"] for r in own) / len(own), 4),
            }
        lengths[str(length)] = {"samples": len({r["id"] for r in records if r["length"] == length}), "rows": rows}
    return {**_head(config), "tasks": tasks, "lengths": lengths}


def _in_order(suite: str, tasks: set[str]) -> list[str]:
    """As the suite reports them, whichever worker was the first to be done; after them any that it doesn't know."""
    known = find_suite(suite)
    order = (*known.tasks, *known.extra)
    return [task for task in order if task in tasks] + sorted(tasks.difference(order))


def text_metrics(config: RunConfig, records: Sequence[Record]) -> Metrics:
    """Divergence, likelihood and attention error by length and row."""
    lengths = {}
    for length in sorted({record["length"] for record in records}):
        rows = {}
        for key, own in _by_row(record for record in records if record["length"] == length):
            row: Metrics = {**_about(own)}
            for name in ("kl", "nll", "top_agrees"):
                row[name] = bootstrap([[record[name] for record in own]]).to_dict(digits=5)
            row["perplexity"] = round(math.exp(row["nll"]["mean"]), 4)
            if "key_nll" in own[0]:
                row |= _longppl(own)
            for name in ("error", "mass"):
                grids = [record[name] for record in own if record.get(name)]
                if grids:
                    row[name] = bootstrap([[_mean(grid) for grid in grids]]).to_dict(digits=5)
                    row[f"{name}_by_layer"] = _by_layer(grids)
                    row[f"{name}_by_head"] = _by_head(grids)
            rows[key] = row
        lengths[str(length)] = {"samples": len({r["id"] for r in records if r["length"] == length}), "rows": rows}
    return {**_head(config), "lengths": lengths}


def _longppl(own: Sequence[Record]) -> Metrics:
    count = sum(record["key_tokens"] for record in own)
    value = math.exp(sum(record["key_nll"] for record in own) / count) if count else None
    return {"longppl": value and round(value, 4), "key_tokens": count}


def _head(config: RunConfig) -> Metrics:
    return {
        "suite": config.suite,
        "model": Path(config.model).name,
        "dtype": config.dtype,
        "seed": config.seed,
        **({} if config.is_text else {"question": config.question}),
        "methods": {
            spec: {"title": title(spec), "paper": METHODS[spec.partition(":")[0]].paper} for spec in config.methods
        },
    }


def _by_row(records: Iterable[Record]) -> list[tuple[str, list[Record]]]:
    """Rows in the order of METHODS, then of budgets."""
    rows: dict[str, list[Record]] = {}
    for record in records:
        rows.setdefault(record["row"], []).append(record)
    names = list(METHODS)

    def place(item: tuple[str, list[Record]]) -> tuple[int, str, float]:
        spec = item[1][0]["method"]
        return names.index(spec.partition(":")[0]), spec, item[1][0]["budget"] or 0.0

    return sorted(rows.items(), key=place)


def _about(own: Sequence[Record]) -> Metrics:
    return {
        "method": own[0]["method"],
        "title": title(own[0]["method"]),
        "budget": own[0]["budget"],
        "kv_budget": round(sum(record["kv_budget"] for record in own) / len(own), 5),
        "n": len(own),
    }


def _mean(grid: list[list[float]]) -> float:
    values = [value for row in grid for value in row if value is not None]
    return sum(values) / len(values)


def _by_layer(grids: list[list[list[float]]]) -> list[float]:
    return [round(_mean([grid[layer] for grid in grids]), 5) for layer in range(len(grids[0]))]


def _by_head(grids: list[list[list[float]]]) -> list[list[float]]:
    return [
        [round(_mean([[grid[layer][head]] for grid in grids]), 5) for head in range(len(grids[0][layer]))]
        for layer in range(len(grids[0]))
    ]


Column = tuple[str, Callable[[Metrics], str]]


def table(metrics: Metrics) -> str:
    """Markdown in the form of the paper's: methods with their budget as rows, tasks as columns, the average last."""
    parts = []
    for length, found in metrics["lengths"].items():
        columns = _columns(metrics, found["rows"])
        lines = [f"## {metrics['suite']}, {length} tokens, {metrics['model']}, {found['samples']} samples", ""]
        lines.append("| method | KV budget | " + " | ".join(name for name, _ in columns) + " |")
        lines.append("|---|" + "---|" * (len(columns) + 1))
        for row in found["rows"].values():
            cells = [show(row) for _, show in columns]
            lines.append(f"| {row['title']} | {row['kv_budget']:.3f} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _columns(metrics: Metrics, rows: Metrics) -> list[Column]:
    if "tasks" in metrics:

        def task_column(task: str) -> Column:
            return task, lambda row: f"{row['tasks'][task]['mean']:.1f}" if task in row["tasks"] else ""

        there = [task for task in metrics["tasks"] if any(task in row["tasks"] for row in rows.values())]
        return [
            *map(task_column, there),
            ("average", lambda row: f"**{row['average']['mean']:.1f}**"),
            ("95%", _interval),
        ]
    some = next(iter(rows.values()))
    columns: list[Column] = []
    if "error" in some:
        columns.append(("attention error", lambda row: f"{row['error']['mean']:.4f}" if "error" in row else ""))
        columns.append(("mass", lambda row: f"{row['mass']['mean']:.3f}" if "mass" in row else ""))
    columns.append(("KL", lambda row: f"{row['kl']['mean']:.4f}"))
    columns.append(("top token as full", lambda row: f"{row['top_agrees']['mean']:.3f}"))
    columns.append(("perplexity", lambda row: f"{row['perplexity']:.3f}"))
    if "longppl" in some:
        columns.append(("LongPPL", lambda row: "" if row["longppl"] is None else f"{row['longppl']:.3f}"))
        columns.append(("key tokens", lambda row: str(row["key_tokens"])))
    return columns


def _interval(row: Metrics) -> str:
    return f"{row['average']['low']:.1f} to {row['average']['high']:.1f}"
