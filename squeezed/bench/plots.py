"""The picture of a sweep: how many times as fast as dense, against the length of the context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_KINDS = ("sparsity", "levels")


def plot_speedups(run: dict[str, Any], target: Path) -> None:
    """One panel for each number of queries and head shape, one line for each way of selecting, into a PNG file.

    Args:
        run: as `squeeze bench attention --json` prints it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = run["rows"]
    shapes = list(dict.fromkeys((row["q_heads"], row["kv_heads"]) for row in rows))
    counts = sorted({row["queries"] for row in rows})
    # One axis for all panels: each has a tick for every length of any.
    ticks = sorted({row["context"] for row in rows})
    figure, axes = plt.subplots(
        len(shapes), len(counts), figsize=(4.2 * len(counts), 3.4 * len(shapes)), squeeze=False, sharex=True
    )
    for line, (q_heads, kv_heads) in enumerate(shapes):
        for column, queries in enumerate(counts):
            panel = axes[line][column]
            mine = [r for r in rows if (r["q_heads"], r["kv_heads"], r["queries"]) == (q_heads, kv_heads, queries)]
            for kind in dict.fromkeys(tuple(row[name] for name in _KINDS) for row in mine):
                points = sorted(
                    (row["context"], row["speedup"]) for row in mine if tuple(row[name] for name in _KINDS) == kind
                )
                label = f"sparsity {kind[0]:g}" + (", hierarchical" if kind[1] > 1 else "")
                panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
            panel.axhline(1, color="grey", linewidth=0.8)
            panel.set_xscale("log", base=2)
            panel.set_ylim(bottom=0)
            panel.set_title(f"{'decoding' if queries == 1 else f'{queries} queries'}, {q_heads}/{kv_heads} heads")
            panel.set_xticks(ticks, [f"{tick // 1024}K" if tick < 2**20 else f"{tick // 2**20}M" for tick in ticks])
            panel.minorticks_off()
    for axis in axes[-1]:
        axis.set_xlabel("tokens of fixed context")
    for axis in axes[:, 0]:
        axis.set_ylabel("times as fast as dense")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"{run['device']}, {run['date']}, the fastest dense kernel of each case is 1", fontsize=10)
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)
