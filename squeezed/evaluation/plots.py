"""The pictures of a run: score against KV budget, needles found by length and depth, error by layer."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from squeezed.analysis.plots import figure, save
from squeezed.evaluation.settings import Record

Metrics = dict[str, Any]
_FULL = "full"
# Ours in blue and thick; each peer its own colour and marker; bounds dotted grey.
_STYLES: dict[str, dict[str, Any]] = {
    "squeezed": {"color": "#0b4f9e", "marker": "o", "linewidth": 2.6, "zorder": 5},
    "squeezed-2": {"color": "#3d8bd9", "marker": "s", "linewidth": 2.2, "zorder": 4.5},
    "squeezed-compact": {"color": "#17a2c9", "marker": "h", "linewidth": 2.2, "zorder": 4.5},
    "squeezed-paper": {"color": "#5b7fb0", "marker": "o", "linewidth": 1.6, "linestyle": "--", "zorder": 4},
    "squeezed-paper-2": {"color": "#8fb0d6", "marker": "s", "linewidth": 1.6, "linestyle": "--", "zorder": 4},
    "multipole": {"color": "#b3541e", "marker": "^"},
    "retroinfer": {"color": "#d08a00", "marker": "v"},
    "quest": {"color": "#b02a37", "marker": "D"},
    "actqkv": {"color": "#8a5a9e", "marker": "P"},
    "tokenselect": {"color": "#2f7d4f", "marker": "X"},
    "recycled": {"color": "#6aa84f", "marker": "<"},
    "magicpig": {"color": "#c2589d", "marker": ">"},
    "cascade": {"color": "#7a6a53", "marker": "p"},
    "streaming": {"color": "#a08c72", "marker": "d"},
    "random": {"color": "0.55", "marker": "x", "linestyle": ":"},
    "oracle": {"color": "0.25", "marker": "*", "linestyle": ":"},
}
_LABEL_GAP, _LABEL_LINE = 0.047, 0.035  # of a label of one line, and of each more; shares of the axis
_LABEL = 38  # characters in a line of a label
_TITLE = 40  # characters in a line above a map
_DASHES = ((0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
_SPARE = ("#444444", "#996633", "#336699", "#669933", "#993366")


def draw(metrics: Metrics, records: Sequence[Record], folder: Path) -> list[Path]:
    """All pictures that the run has data for."""
    written = []
    if "tasks" in metrics:
        average = [("average", lambda row: row["average"], "score, mean of tasks (%)")]
        written.append(save(against_budget(metrics, average), folder / "accuracy.png"))
        if len(metrics["tasks"]) > 1:
            written.append(save(by_task(metrics), folder / "tasks.png"))
        if any(_is_needle(record) for record in records):
            written.append(save(needles(metrics, records), folder / "needles.png"))
        return written
    panels: list[Panel] = [("KL", lambda row: row["kl"], "KL of next-token distribution to full attention")]
    if metrics["suite"] == "fidelity":
        panels.insert(0, ("error", lambda row: row.get("error"), "relative error of attention output"))
        written.append(save(errors_by_layer(metrics), folder / "errors.png"))
    written.append(save(against_budget(metrics, panels, falling=True), folder / "fidelity.png"))
    return written


Panel = tuple[str, Callable[[Metrics], dict[str, float] | None], str]


def against_budget(metrics: Metrics, panels: Sequence[Panel], falling: bool = False) -> Figure:
    """A row of panels per quantity, one for each length: value against realised KV budget, labelled at the lines."""
    lengths = list(metrics["lengths"])
    columns = min(2, len(lengths)) if len(panels) == 1 else len(lengths)
    rows = -(-len(lengths) // columns) * len(panels)
    drawn, axes = figure(rows, columns, (7.6 * columns, 5.4 * rows), squeeze=False)
    flat = list(axes.flat)
    cells = [(panel, length) for panel in panels for length in lengths]
    for axis, ((_, value, name), length) in zip(flat, cells, strict=False):
        found = metrics["lengths"][length]
        _budget_panel(axis, found["rows"], value, falling)
        axis.set_ylabel(name)
        axis.set_title(f"{int(length):,} tokens, {found['samples']} samples")
    for axis in flat[len(cells) :]:
        axis.remove()
    drawn.suptitle(f"{metrics['suite']}, {metrics['model']}")
    return drawn


def _budget_panel(axis: Any, rows: Metrics, value: Callable[[Metrics], dict[str, float] | None], falling: bool) -> None:
    full = value(rows[_FULL]) if _FULL in rows else None
    if full is not None and not falling:
        axis.axhline(full["mean"], color="black", linewidth=1.4, zorder=3)
        axis.axhspan(full["low"], full["high"], color="black", alpha=0.08, linewidth=0)
    ends: list[tuple[float, float, str, dict[str, Any]]] = []
    for spec, style in _styles(rows).items():
        if spec == _FULL:
            continue
        own = [(row["kv_budget"], value(row), row) for row in rows.values() if row["method"] == spec]
        points = sorted(((x, y) for x, y, _ in own if y is not None), key=lambda point: point[0])
        if not points:
            continue
        xs = [x for x, _ in points]
        ys = np.array([[y["mean"], y["low"], y["high"]] for _, y in points])
        axis.plot(xs, ys[:, 0], markersize=6, **{"linewidth": 1.3, "linestyle": "-", "zorder": 3, **style})
        if spec == "squeezed" and not falling:
            axis.fill_between(xs, ys[:, 1], ys[:, 2], color=style["color"], alpha=0.10, linewidth=0)
        ends.append((xs[-1], float(ys[-1, 0]), own[0][2]["title"], style))
    axis.set_xscale("log")
    if falling:
        axis.set_yscale("log")
    _budget_ticks(axis, [row["kv_budget"] for row in rows.values() if row["method"] != _FULL])
    if full is not None and not falling:
        ends.append((axis.get_xlim()[1], full["mean"], f"full attention {full['mean']:.1f}", {"color": "black"}))
    _label_ends(axis, ends, falling)


def _styles(rows: Metrics) -> dict[str, dict[str, Any]]:
    """By method, in the order of the rows: one method with several options has one colour and several dashes."""
    styles: dict[str, dict[str, Any]] = {}
    for spec in dict.fromkeys(row["method"] for row in rows.values()):
        alike = sum(":" in other and other.partition(":")[0] == spec.partition(":")[0] for other in styles)
        styles[spec] = {**_style(spec), **({"linestyle": _DASHES[(alike - 1) % len(_DASHES)]} if alike else {})}
    return styles


def _style(spec: str) -> dict[str, Any]:
    if spec in _STYLES:
        return _STYLES[spec]
    spare = {"marker": "o", "color": _SPARE[sum(map(ord, spec)) % len(_SPARE)]}
    # A method with options looks like the method, with hollow markers.
    return {**_STYLES.get(spec.partition(":")[0], spare), "markerfacecolor": "white"}


def _between(low: float, high: float) -> float:
    """A number to label an axis with that has no round one."""
    return float(f"{(low * high) ** 0.5:.2g}")


def _budget_ticks(axis: Any, budgets: Sequence[float]) -> None:
    """Log axis: what differs is at the small budgets, and most readers look there."""
    low, high = min(budgets, default=0.05), max(budgets, default=1.0)
    # Methods under one budget differ by little: spread over the whole axis, that would look like much.
    wider = max(1.0, (2 * low / high) ** 0.5)
    low, high = low / wider, high * wider
    round_ones = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0)
    ticks = [tick for tick in round_ones if low / 1.15 <= tick <= high * 1.1]
    if len(ticks) < 2:  # methods under one budget
        ticks = [_between(low, high)]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlim(low / 1.15, high * 1.1)
    axis.set_xlabel("KV budget: bytes read per token / bytes of the full KV (log)")


def _label_ends(axis: Any, ends: Sequence[tuple[float, float, str, dict[str, Any]]], log: bool) -> None:
    """Names right of the axes, moved apart where lines end close together, each tied to its line."""
    low, high = axis.get_ylim()

    def place(y: float) -> float:
        return (np.log(y / low) / np.log(high / low)) if log else (y - low) / (high - low)

    ordered = sorted(ends, key=lambda end: end[1])
    names = [textwrap.fill(name, _LABEL) for _, _, name, _ in ordered]
    sizes = [_LABEL_GAP + _LABEL_LINE * name.count("\n") for name in names]
    heights = _apart([place(max(y, 1e-12)) for _, y, _, _ in ordered], sizes)
    for (x, y, _, style), name, height in zip(ordered, names, heights, strict=True):
        axis.annotate(
            name,
            xy=(x, y),
            xycoords="data",
            xytext=(1.03, height),
            textcoords="axes fraction",
            color=style["color"],
            fontsize=9,
            va="center",
            fontweight="bold" if style.get("linewidth", 1) > 2 else "normal",
            arrowprops={
                "arrowstyle": "-",
                "color": style["color"],
                "linewidth": 0.5,
                "alpha": 0.5,
                "relpos": (0.0, 0.5),
                "shrinkA": 1,
                "shrinkB": 3,
            },
            annotation_clip=False,
        )


def _apart(heights: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """The nearest ascending heights (least squares) at which labels of these sizes stay apart: isotonic regression."""
    # Of labels that touch, each stands half its own size and half of its neighbour's above that neighbour.
    below = [sum((a + b) / 2 for a, b in pairwise(sizes[: i + 1])) for i in range(len(sizes))]
    blocks: list[list[float]] = []  # sum and number of members, which stand as one
    for height, offset in zip(heights, below, strict=True):
        blocks.append([height - offset, 1.0])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + count]
    levels = [total / count for total, count in blocks for _ in range(int(count))]
    found = [level + offset for level, offset in zip(levels, below, strict=True)]
    over = max(0.0, (found[-1] if found else 0.0) - 1.0)
    return [height - over for height in found]


def by_task(metrics: Metrics) -> Figure:
    """The longest length, one small panel for each task."""
    length = list(metrics["lengths"])[-1]
    found = metrics["lengths"][length]
    tasks = [task for task in metrics["tasks"] if any(task in row["tasks"] for row in found["rows"].values())]
    columns = min(4, len(tasks))
    rows = -(-len(tasks) // columns)
    drawn, axes = figure(rows, columns, (3.9 * columns, 3.0 * rows), squeeze=False)
    handles: dict[str, Any] = {}
    styles = _styles(found["rows"])
    for axis, task in zip(axes.flat, tasks, strict=False):
        for spec, style in styles.items():
            own = [row for row in found["rows"].values() if row["method"] == spec and task in row["tasks"]]
            if spec == _FULL:
                axis.axhline(own[0]["tasks"][task]["mean"], color="black", linewidth=1.4) if own else None
                continue
            points = sorted((row["kv_budget"], row["tasks"][task]["mean"]) for row in own)
            if points:
                (line,) = axis.plot(
                    *zip(*points, strict=True), markersize=4, **{"linewidth": 1.1, "linestyle": "-", **style}
                )
                handles[own[0]["title"]] = line
        axis.set_title(task, fontsize=10)
        axis.set_xscale("log")
        axis.set_ylim(-4, 104)
    for axis in axes.flat:
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
        low, high = axis.get_xlim()
        axis.set_xticks([0.05, 0.1, 0.2, 0.4] if high > 2 * low else [_between(low, high)])
    for axis in list(axes.flat)[len(tasks) :]:
        axis.remove()
    drawn.suptitle(
        f"{metrics['suite']}, {int(length):,} tokens, {metrics['model']}: score (%) against KV budget (log) by task; "
        "black is full attention"
    )
    names = [textwrap.fill(name, _LABEL) for name in handles]
    drawn.legend(handles.values(), names, loc="outside lower center", ncols=5, frameon=False)
    return drawn


_DEPTHS = 5
_DARK = 60  # percent from which a cell is dark enough for white figures


def _is_needle(record: Record) -> bool:
    return "niah" in record["task"] and record.get("depth") is not None


def needles(metrics: Metrics, records: Sequence[Record]) -> Figure:
    """Score by length and depth of the needle, one map per method, at its lowest budget of at least 0.1."""
    records = [record for record in records if _is_needle(record)]
    lengths = sorted({record["length"] for record in records})
    chosen: dict[str, str] = {}
    for record in sorted(records, key=lambda r: r["budget"] or 0.0):
        if record["budget"] is None or record["budget"] >= 0.1 - 1e-9:
            chosen.setdefault(record["method"], record["row"])
    columns = min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    size = (3.2 * columns + 1, (0.42 * len(lengths) + 1.45) * rows + 0.6)
    drawn, axes = figure(rows, columns, size, squeeze=False, sharex=True, sharey=True)
    image = None
    for axis, row in zip(axes.flat, chosen.values(), strict=False):
        own = [record for record in records if record["row"] == row]
        grid = np.full((len(lengths), _DEPTHS), np.nan)
        for i, length in enumerate(lengths):
            for j in range(_DEPTHS):
                scores = [
                    r["score"]
                    for r in own
                    if r["length"] == length and min(_DEPTHS - 1, int(r["depth"] * _DEPTHS)) == j
                ]
                if scores:
                    grid[i, j] = 100 * float(np.mean(scores))
        image = axis.imshow(grid, vmin=0, vmax=100, cmap="YlGnBu", aspect="auto")
        for (i, j), score in np.ndenumerate(grid):
            shown, colour = f"{score:.0f}", "white" if score >= _DARK else "black"
            axis.text(j, i, "" if np.isnan(score) else shown, ha="center", va="center", fontsize=8, color=colour)
        kv_budget = np.mean([record["kv_budget"] for record in own])
        name = metrics["lengths"][str(lengths[-1])]["rows"].get(row, {}).get("title", row)
        axis.set_title(textwrap.fill(f"{name}, {kv_budget:.3f}", _TITLE), fontsize=9)
        axis.set_xticks(range(_DEPTHS), [f"{(j + 0.5) / _DEPTHS:.0%}" for j in range(_DEPTHS)])
        axis.set_yticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axis.grid(False)
    for axis in list(axes.flat)[len(chosen) :]:
        axis.remove()
    drawn.supxlabel("depth of the needle in the context")
    drawn.supylabel("tokens")
    drawn.suptitle(f"Needles found (%), {metrics['model']}; method, realised KV budget")
    if image is not None:
        drawn.colorbar(image, ax=list(axes.flat)[: len(chosen)], shrink=0.8, pad=0.01)
    return drawn


def errors_by_layer(metrics: Metrics) -> Figure:
    """Relative attention-output error by layer, each method at its budget nearest to 0.1; the longest length."""
    length = list(metrics["lengths"])[-1]
    rows = metrics["lengths"][length]["rows"]
    drawn, axis = figure(1, 1, (9.5, 5.6))
    ends = []
    for spec, style in _styles(rows).items():
        own = [row for row in rows.values() if row["method"] == spec and "error_by_layer" in row]
        if spec == _FULL or not own:
            continue
        row = min(own, key=lambda row: abs(row["kv_budget"] - 0.1))
        values = row["error_by_layer"]
        axis.plot(range(len(values)), values, markersize=4, **{"linewidth": 1.3, "linestyle": "-", **style})
        ends.append((len(values) - 1, values[-1], f"{row['title']}, {row['kv_budget']:.3f}", style))
    axis.set_yscale("log")
    axis.set_xlabel("layer")
    axis.set_ylabel("relative error of attention output")
    axis.set_title(f"Error by layer at a KV budget near 0.1, {int(length):,} tokens, {metrics['model']}")
    if ends:
        _label_ends(axis, ends, log=True)
    return drawn
