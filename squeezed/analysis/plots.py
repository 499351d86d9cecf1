"""The pictures, readable in black and white: hatching, markers and line styles carry what colour would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from squeezed.analysis.cost import Cost, decode, prefill, total
from squeezed.analysis.devices import Device
from squeezed.analysis.roofline import from_ridge
from squeezed.analysis.study import Study, by_name, human, tokens_text

STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "axes.grid": True,
    "grid.color": "0.88",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.5,
}
LINES: dict[str, dict[str, Any]] = {
    "dense": {"color": "black", "linestyle": "-", "marker": "o"},
    "squeezed": {"color": "#1f5fa8", "linestyle": "--", "marker": "s"},
    "hierarchical": {"color": "#b3541e", "linestyle": "-.", "marker": "^"},
}
_MARKERS = {
    "attention projections": "o",
    "FFN": "s",
    "router": "v",
    "experts": "p",
    "LM head": "^",
    "attention": "D",
    "window attention": "d",
    "centroid lookup": "P",
    "sparse attention": "*",
}


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG that stays small: 100 dots per inch, nothing of the machine in its metadata."""
    figure.savefig(path, dpi=100, bbox_inches="tight", metadata={"Software": None})
    return path


def figure(rows: int, columns: int, size: tuple[float, float], **keywords: Any) -> tuple[Figure, Any]:
    """A figure outside pyplot, so that nothing global is opened or left open."""
    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=size, layout="constrained")
        return drawn, drawn.subplots(rows, columns, **keywords)


# Tones of log10(intensity / ridge); light enough at 1 that hatching, not tone, tells the regimes apart.
_DARKEST, _LIGHTEST = -4.0, 2.0


def heat_maps(study: Study) -> Figure:
    """Arithmetic intensity over the ridge, over batch and length, for linear layers, attention and the whole."""
    batches = [4**power for power in range(6)]
    lengths = [4**power for power in range(3, 11)]
    drawn, axes = figure(2, 3, (14, 8))
    for row, (phase, make) in enumerate({"Prefill": prefill, "Generation": decode}.items()):
        for column, kind in enumerate(("linear", "attention", None)):
            ratios = np.empty((len(batches), len(lengths)))
            for i, batch in enumerate(batches):
                for j, length in enumerate(lengths):
                    cost = total(study.operations(make(batch, length), "dense"), kind)  # type: ignore[arg-type]
                    ratios[i, j] = from_ridge(cost, study.device)
            axis = axes[row, column]
            _heat(axis, ratios, batches, lengths)
            what = {"linear": "linear layers", "attention": "attention", None: "whole model"}[kind]
            axis.set_title(f"{phase}: {what}")
            axis.set_xlabel("prompt length (tokens)" if row == 0 else "context length (tokens)")
            axis.set_ylabel("batch (sequences)")
    drawn.suptitle(
        f"{study.model.name} on {study.device.title}: arithmetic intensity ÷ ridge point "
        f"({study.device.ridge:.0f} FLOP/byte)\n"
        "hatched, below 1: memory is the limit        plain, 1 and above: compute is the limit",
        fontsize=12,
    )
    return drawn


def _heat(axis: Any, ratios: np.ndarray, batches: list[int], lengths: list[int]) -> None:
    logs = np.log10(ratios)
    axis.imshow(logs, cmap="Greys_r", vmin=_DARKEST, vmax=_LIGHTEST, aspect="auto", origin="lower")
    axis.grid(False)
    for (i, j), ratio in np.ndenumerate(ratios):
        tone = (logs[i, j] - _DARKEST) / (_LIGHTEST - _DARKEST)
        dark = tone < 0.5
        if ratio < 1:
            edge = "0.85" if dark else "0.4"
            axis.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, hatch="///", edgecolor=edge, linewidth=0))
        box = {"facecolor": matplotlib.colormaps["Greys_r"](tone), "edgecolor": "none", "pad": 1.5}
        axis.text(
            *(j, i, _short(ratio)), ha="center", va="center", fontsize=9, color="white" if dark else "black", bbox=box
        )
    axis.set_xticks(range(len(lengths)), [tokens_text(length) for length in lengths])
    axis.set_yticks(range(len(batches)), [str(batch) for batch in batches])
    axis.spines[:].set_visible(False)


def _short(ratio: float) -> str:
    if ratio >= 10:
        return f"{ratio:.0f}"
    return f"{ratio:.1f}" if ratio >= 1 else f"{ratio:.2g}" if ratio >= 0.1 else f"{ratio:.1g}"


def roofline(study: Study) -> Figure:
    """The device's roofs with every operation of prefill, user input and generation placed on the achievable one."""
    device = study.device
    drawn, axis = figure(1, 1, (11.5, 6.4))
    intensities = np.logspace(-1, 5.4, 400)
    reached = device.achievable
    roofs = {
        "datasheet peak": (device.flops, device.bandwidth, {"color": "black", "linestyle": "-", "linewidth": 1.8}),
        "achievable, linear layers": (
            device.flops * reached.matmul,
            device.bandwidth * reached.bandwidth,
            {"color": "0.35", "linestyle": "--", "linewidth": 1.3},
        ),
        "achievable, attention": (
            device.flops * reached.attention,
            device.bandwidth * reached.bandwidth,
            {"color": "0.35", "linestyle": ":", "linewidth": 1.6},
        ),
    }
    for label, (flops, bandwidth, style) in roofs.items():
        axis.plot(intensities, np.minimum(flops, intensities * bandwidth), label=label, **style)
    axis.axvline(device.ridge, color="0.6", linewidth=0.8)
    points = [
        (name, phase, total(group))
        for phase, step in study.phases.items()
        for method in (("dense",) if phase == "prefill" else ("dense", "squeezed"))
        for name, group in by_name(study.operations(step, method)).items()
        if method == "dense" or name in ("centroid lookup", "sparse attention")
    ]
    lowest = _place(axis, device, points)
    axis.set(xscale="log", yscale="log", xlim=(0.3, 2e5), ylim=(lowest / 4, device.flops * 2.5))
    for x, text, side in ((0.8, "memory is the limit", "right"), (1.25, "compute is the limit", "left")):
        axis.text(device.ridge * x, lowest / 2.6, text, ha=side, color="0.3")
    axis.text(device.ridge * 1.25, lowest / 1.5, f"ridge point {device.ridge:.0f} FLOP/byte", color="0.3")
    axis.set_xlabel("arithmetic intensity (FLOP per byte moved)")
    axis.set_ylabel("attainable FLOP/s")
    axis.yaxis.set_major_formatter(lambda value, _: human(value, "FLOP/s"))
    axis.set_title(
        f"{study.model.name} on {device.title}: batch {study.batch}, fixed context {tokens_text(study.length)}, "
        f"user input {tokens_text(study.queries)} tokens, sparsity {study.sparsity:g}"
    )
    for name in dict.fromkeys(name for name, _, _ in points):
        axis.plot([], [], _MARKERS[name], color="black", fillstyle="none", markersize=9, label=name)
    for phase, fill in _FILLS.items():
        axis.plot([], [], "o", markersize=9, markeredgecolor="black", label=f"fill: {phase}", **fill)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return drawn


_FILLS: dict[str, dict[str, Any]] = {
    "prefill": {"markerfacecolor": "black"},
    "user input": {"markerfacecolor": "0.65"},
    "generation": {"markerfacecolor": "white"},
}


def _place(axis: Any, device: Device, points: list[tuple[str, str, Cost]]) -> float:
    """Draw operations on their roof; those too close to tell apart hang below it on a thin line. Returns the lowest."""
    drawn: list[tuple[float, float]] = []
    for name, phase, cost in sorted(points, key=lambda point: point[2].intensity):
        linear = name in ("attention projections", "FFN", "router", "experts", "LM head")
        share = device.achievable.matmul if linear else device.achievable.attention
        roof = height = min(device.flops * share, cost.intensity * device.bandwidth * device.achievable.bandwidth)
        while any(abs(np.log10(cost.intensity / x)) < 0.07 and abs(np.log10(height / y)) < 0.13 for x, y in drawn):
            height /= 10**0.02
        drawn.append((cost.intensity, height))
        axis.plot([cost.intensity] * 2, [roof, height], color="0.4", linewidth=0.8, zorder=2)
        size = 13 if _MARKERS[name] == "*" else 8.5
        spot = ([cost.intensity], [height], _MARKERS[name])
        axis.plot(*spot, markersize=size, markeredgecolor="black", zorder=3, **_FILLS[phase])
    return min(height for _, height in drawn)
