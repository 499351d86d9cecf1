"""Pictures of generation: time per token, the speed-up, and over batch and context what pays and what fits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from squeezed.analysis.cost import decode
from squeezed.analysis.measured import Comparison
from squeezed.analysis.plots import LINES, figure
from squeezed.analysis.study import METHODS, Study, attention_seconds, human, tokens_text

_BATCHES = [1, 2, 4, 8, 16, 32, 64]


def time_per_token(study: Study) -> Figure:
    """Predicted time per generated token and the speed-up over dense, of the whole model and of attention alone."""
    contexts = [2**power for power in range(10, 21)]
    drawn, (left, right) = figure(1, 2, (14, 5.4))
    times = {method: [study.token_seconds(context, method) for context in contexts] for method in METHODS}
    attention = {m: [attention_seconds(study, decode(study.batch, c), m) for c in contexts] for m in METHODS}
    for method, line in LINES.items():
        left.plot(contexts, times[method], label=method, markersize=5, **line)
        if method == "dense":
            continue
        whole, alone = (_ratio(values["dense"], values[method]) for values in (times, attention))
        right.plot(contexts, whole, label=f"{method}, whole token", markersize=5, **line)
        right.plot(contexts, alone, label=f"{method}, attention alone", markersize=6, markerfacecolor="white", **line)
        pays = study.crossover(method)
        if pays is not None and contexts[0] < pays < contexts[-1]:
            left.axvline(pays, color=line["color"], linestyle=":", linewidth=1)
    fits = study.largest_context("dense")
    for axis in (left, right):
        if fits is not None and fits < contexts[-1]:
            axis.axvspan(
                max(fits, contexts[0] / 1.1),
                contexts[-1] * 1.1,
                facecolor="none",
                edgecolor="0.8",
                hatch="xx",
                linewidth=0,
            )
        axis.set_xscale("log", base=2)
        axis.set_xlim(contexts[0] / 1.1, contexts[-1] * 1.1)
        axis.set_xticks(contexts, [tokens_text(context) for context in contexts])
        axis.set_xlabel("fixed context (tokens)")
    left.set_yscale("log")
    flat = [seconds for values in times.values() for seconds in values]
    left.set_ylim(min(flat) / 1.4, max(flat) * 1.4)
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    left.yaxis.set_minor_locator(NullLocator())
    left.yaxis.set_major_formatter(lambda value, _: human(value, "s"))
    left.set_ylabel(f"time per step of {study.batch} token{'s' if study.batch > 1 else ''}")
    left.set_title("Predicted time per generated token")
    right.axhline(1, color="black", linewidth=1)
    right.set_ylim(0, max(2.0, *right.dataLim.intervaly * 1.06))
    right.set_ylabel("speed-up over dense (times)")
    right.set_title("Predicted speed-up")
    for axis in (left, right):
        axis.legend(loc="best", frameon=True, framealpha=1, edgecolor="none")
    drawn.suptitle(_heading(study) + _notes(study, fits, contexts[-1]), fontsize=11.5)
    return drawn


def limits(study: Study) -> Figure:
    """Over batch and context: where squeezing pays, by how much, and what does not fit in memory."""
    drawn, axis = figure(1, 1, (10.5, 6))
    low, high = 2**10, 2**22
    positions = np.arange(len(_BATCHES))
    top, squeezed_top = (
        [_clipped(study.largest_context(method, batch), low, high) for batch in _BATCHES]
        for method in ("dense", "squeezed")
    )
    axis.fill_between(positions, top, high, facecolor="white", edgecolor="0.75", hatch="xx", linewidth=0)
    axis.plot(positions, top, label="largest context that fits, dense", linewidth=2, clip_on=False, **LINES["dense"])
    axis.plot(positions, squeezed_top, label="the same with centroids stored", clip_on=False, **LINES["squeezed"])
    styles = {1.0: "-", 1.5: "--", 2.0: "-.", 3.0: ":", 5.0: (0, (1, 3))}
    for speedup, style in styles.items():
        points = [study.crossover("squeezed", batch, speedup) for batch in _BATCHES]
        shown = [(p, c) for p, c in zip(positions, points, strict=True) if c is not None and c < high]
        if not shown:
            continue
        label = "squeezing starts to pay" if speedup == 1 else f"token {speedup:g} times as fast"
        axis.plot(*zip(*shown, strict=True), color="0.25", linestyle=style, linewidth=1.5, label=label)
    starts = [study.crossover("squeezed", batch) or high for batch in _BATCHES]
    axis.fill_between(positions, low, starts, facecolor="0.9", edgecolor="0.7", hatch="...", linewidth=0)
    axis.set_yscale("log", base=2)
    axis.set_ylim(low, high)
    axis.set_xlim(positions[0], positions[-1])
    axis.set_xticks(positions, [str(batch) for batch in _BATCHES])
    ticks = [2**power for power in range(10, 23)]
    axis.set_yticks(ticks, [tokens_text(tick) for tick in ticks])
    axis.set_xlabel("batch (sequences, each with its own context)")
    axis.set_ylabel("fixed context (tokens)")
    box = {"facecolor": "white", "edgecolor": "none", "pad": 3}
    if top[-1] < high / 2:
        axis.text(0.97, 0.96, "does not fit in memory", transform=axis.transAxes, ha="right", va="top", bbox=box)
    if starts[0] > low * 2:
        axis.text(0.03, 0.04, "squeezing does not pay", transform=axis.transAxes, va="bottom", bbox=box)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    axis.set_title(_heading(study, batch=False) + "\nwhere squeezing pays and what fits", fontsize=11.5)
    return drawn


def comparison(rows: list[Comparison], device: str) -> Figure:
    """Measured against predicted times, dense and squeezed, with the hardware floor of each."""
    drawn, axis = figure(1, 1, (max(8.0, 1.1 * len(rows) + 4), 5.2))
    positions = np.arange(len(rows))
    looks: list[tuple[str, float, dict[str, Any]]] = [
        ("dense", -0.2, {"facecolor": "0.8", "hatch": ""}),
        ("squeezed", 0.2, {"facecolor": "white", "hatch": "///"}),
    ]
    for method, shift, look in looks:
        chosen = [getattr(row, method) for row in rows]
        axis.bar(
            positions + shift,
            [c.measured for c in chosen],
            0.36,
            edgecolor="black",
            label=f"{method}, measured",
            **look,
        )
        axis.scatter(
            *(positions + shift, [c.predicted for c in chosen]),
            marker="D",
            color="black",
            zorder=3,
            label="predicted" if method == "dense" else None,
        )
        floors = [c.floor for c in chosen]
        axis.hlines(
            floors,
            positions + shift - 0.18,
            positions + shift + 0.18,
            colors="black",
            linewidth=2.5,
            zorder=3,
            label="hardware floor" if method == "dense" else None,
        )
        for position, one in zip(positions + shift, chosen, strict=True):
            axis.annotate(
                *(f"{one.share:.0%}", (position, max(one.measured, one.predicted))),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
            )
    axis.set_yscale("log")
    low = min(min(row.dense.floor, row.squeezed.floor) for row in rows)
    high = max(max(row.dense.measured, row.dense.predicted, row.squeezed.measured) for row in rows)
    axis.set_ylim(10 ** math.floor(math.log10(low) - 0.15), high * 3)
    axis.yaxis.set_major_formatter(lambda value, _: human(value, "s"))
    axis.set_xticks(positions, [row.label for row in rows])
    axis.set_ylabel("time")
    axis.grid(axis="x", visible=False)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    axis.set_title(f"Measured on {device} over the prediction\nabove each bar: share of the hardware floor reached")
    return drawn


def _clipped(context: int | None, low: int, high: int) -> int:
    return high if context is None else min(high, max(low, context))


def _heading(study: Study, batch: bool = True) -> str:
    return f"{study.model.name} on {study.device.title}, sparsity {study.sparsity:g}" + (
        f", batch {study.batch}" if batch else ""
    )


def _notes(study: Study, fits: int | None, longest: int) -> str:
    pays = study.crossover("squeezed")
    notes = ["squeezing never pays" if pays is None else f"squeezing pays from {tokens_text(pays)} tokens (dotted)"]
    if fits is None:
        notes.append("any context fits in memory")
    else:
        notes.append(f"{tokens_text(fits)} tokens fit in memory" + (" (hatched: beyond)" if fits < longest else ""))
    return "\n" + "; ".join(notes)


def _ratio(dense: list[float], other: list[float]) -> list[float]:
    return [a / b for a, b in zip(dense, other, strict=True)]
