"""One self-contained HTML page: the pictures inlined, the tables, the device and where every number comes from."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from squeezed.analysis.measured import Comparison
from squeezed.analysis.study import Study, human, tokens_text

_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #111; background: #fff; max-width: 1180px; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #999; }
table { border-collapse: collapse; margin: .8rem 0; font-size: .87rem; }
th, td { border-bottom: 1px solid #ccc; padding: .25rem .7rem; text-align: right; }
th { border-bottom: 2px solid #333; } td.text, th.text { text-align: left; } tr.sum td { font-weight: 600; }
figure { margin: 1rem 0; } img { max-width: 100%; } figcaption { color: #444; font-size: .87rem; max-width: 62rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .8rem; margin: 1.2rem 0; }
dl div { border: 1px solid #999; padding: .5rem .8rem; } dt { font-size: .82rem; color: #444; }
dd { margin: 0; font-size: 1.35rem; font-weight: 600; } p { max-width: 62rem; }
"""

CAPTIONS = {
    "heatmaps.png": (
        "Where each part is bound",
        "Each cell is arithmetic intensity divided by the ridge point. Prefill leaves the hatched region within a few "
        "hundred tokens. In generation, batching carries the linear layers past the ridge, but every sequence brings "
        "its own KV cache, so attention stays where it is at any batch.",
    ),
    "roofline.png": (
        "The operations on the roofline",
        "Each marker is one operation at its arithmetic intensity, on the roof that software achieves; markers that "
        "would hide each other hang below it. Left of the ridge only fewer bytes help, right of it only fewer FLOPs. "
        "In generation squeezing moves no marker: it shrinks the work itself.",
    ),
    "generation.png": (
        "Time per generated token",
        "Dense attention reads the whole KV cache for every token, so its time grows with the context; squeezed "
        "attention reads centroids and the important keys. What separates the speed-up of attention alone from that of "
        "the whole token is the linear layers.",
    ),
    "limits.png": (
        "What pays and what fits",
        "Below the solid grey line the fixed cost of the extra kernels eats the gain. Centroids take little memory.",
    ),
    "measured.png": (
        "Measured against predicted",
        "Bars are measured, diamonds predicted, thick lines the time that the datasheet peaks allow for the bytes and "
        "FLOPs of the operation. Percentages are the share of that floor reached.",
    ),
}


def page(
    study: Study, results: Mapping[str, Any], images: Sequence[Path], compared: Sequence[Comparison], command: str
) -> str:
    """The whole report as one HTML document that needs no network."""
    title = html.escape(f"{study.model.name} on {study.device.title}")
    body = [
        f"<h1>Roofline of {title}</h1>",
        f"<p>batch {study.batch}, fixed context {tokens_text(study.length)} tokens, user input "
        f"{tokens_text(study.queries)} tokens, {study.tokens} generated tokens, sparsity {study.sparsity:g}, "
        f"{study.precision.weights:g} bytes per weight, {study.precision.cache:g} per KV element. "
        f"<br><code>{html.escape(command)}</code></p>",
        _highlights(study, results),
        *(_figure(image) for image in images),
        *([_measured(compared)] if compared else []),
        _asymptotics(results),
        _operations(results),
        _device(study),
        _method(),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Roofline of {title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_CSS}</style></head>\n<body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _highlights(study: Study, results: Mapping[str, Any]) -> str:
    limits, seconds = results["limits"], {row["method"]: row["seconds"] for row in results["generation"]}
    per_token = {method: value / study.tokens for method, value in seconds.items()}
    cards = {
        "Ridge point": f"{study.device.ridge:.0f} FLOP/byte",
        "Time per generated token, dense": human(per_token["dense"], "s"),
        "the same squeezed": f"{human(per_token['squeezed'], 's')} "
        f"({seconds['dense'] / seconds['squeezed']:.2f} times as fast)",
        "the same hierarchical": f"{human(per_token['hierarchical'], 's')} "
        f"({seconds['dense'] / seconds['hierarchical']:.2f} times as fast)",
        "Squeezing pays from": _tokens(limits["squeezing_pays_from"]["squeezed"]),
        "Largest context that fits, dense": _tokens(limits["largest_context"]["dense"], "no limit"),
        "the same with centroids": _tokens(limits["largest_context"]["squeezed"], "no limit"),
        "KV budget": f"{results['settings']['kv_budget']['squeezed']:.3g} "
        f"(hierarchical {results['settings']['kv_budget']['hierarchical']:.4g})",
    }
    return "<dl>" + "".join(f"<div><dt>{key}</dt><dd>{value}</dd></div>" for key, value in cards.items()) + "</dl>"


def _tokens(count: int | None, absent: str = "never") -> str:
    return absent if count is None else f"{tokens_text(count)} tokens"


def _figure(image: Path) -> str:
    heading, caption = CAPTIONS[image.name]
    data = base64.b64encode(image.read_bytes()).decode("ascii")
    return (
        f'<h2>{heading}</h2><figure><img alt="{heading}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _asymptotics(results: Mapping[str, Any]) -> str:
    rows = [
        [row["phase"], row["part"], row["flops"], row["memory"], row["intensity"]] for row in results["asymptotics"]
    ]
    return (
        "<h2>Asymptotics</h2><p>B sequences, S tokens of prompt or context, k generated tokens, width d. Recovered "
        "from the exact counts by interpolation, assuming that no more tokens are generated than the context holds.</p>"
        + _table(["phase", "part", "FLOPs", "memory operations", "arithmetic intensity"], rows, text=5)
    )


def _operations(results: Mapping[str, Any]) -> str:
    rows = [
        [
            *(row["phase"], row["method"], row["operation"], human(row["flops"], "FLOP"), human(row["bytes"], "B")),
            _plain(row["intensity"]),
            _plain(row["times_ridge"]),
            row["regime"],
            human(row["seconds"], "s"),
            human(row["floor_seconds"], "s"),
        ]
        for row in results["operations"]
    ]
    header = ["pass", "method", "operation", "FLOPs", "memory ops", "FLOP/byte", "÷ ridge", "bound by", "time", "floor"]
    sums = {"all linear layers", "all attention", "whole"}
    return (
        "<h2>Every operation</h2><p>Sums over all layers. <em>Time</em> is predicted with achievable peaks and fixed "
        "costs, <em>floor</em> with datasheet peaks and none. For squeezed methods only attention is listed: the "
        "linear layers do not change.</p>" + _table(header, rows, text=3, bold=lambda row: row[2] in sums)
    )


def _device(study: Study) -> str:
    device, reached = study.device, study.device.achievable
    rows = [
        [peak.assumption, human(peak.flops, "FLOP/s"), human(peak.bandwidth, "B/s"), f"{peak.ridge:.0f}"]
        for peak in device.peaks
    ]
    return (
        f"<h2>The device</h2><p>{html.escape(device.title)}, {human(device.memory, 'B')}. Source: "
        f"{html.escape(device.source)}. Achievable share: {reached.bandwidth:.0%} of bandwidth, {reached.matmul:.0%} "
        f"of compute in linear layers, {reached.attention:.0%} in attention; an operation costs at least "
        f"{human(reached.graph, 's')} in a graph, {human(reached.eager, 's')} called eagerly "
        f"({html.escape(reached.source)}).</p>"
        + _table(["assumption", "compute", "bandwidth", "ridge (FLOP/byte)"], rows, text=1)
        + "<p>A quoted ridge point depends on what was divided by what: sparse rates double it, 16-bit accumulation "
        "doubles it on consumer cards, a PCIe card has other memory than an SXM module, and measured peaks "
        "lower it.</p>"
    )


def _method() -> str:
    return (
        "<h2>How it is counted</h2><p>A multiply-add is two FLOPs; norms, activations and softmax are not counted. "
        "Memory operations are what each operation must move once: weights, inputs, outputs; attention as one fused "
        "kernel that skips masked blocks. Time is the slower of compute and memory plus a fixed cost per kernel, "
        "operations one after the other. Experts are counted as the expected number of distinct ones that a batch "
        "touches. Sliding-window "
        "layers stay dense. Every sequence has its own context. The largest context leaves a tenth of the memory for "
        "workspace. Squeezed Attention: arXiv 2411.09688.</p>"
    )


def _plain(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.2g}"


def _measured(compared: Sequence[Comparison]) -> str:
    rows = [
        [
            row.label.replace("\n", ", "),
            method,
            *(human(one.measured, "s"), human(one.predicted, "s"), f"{one.predicted / one.measured:.2f}"),
            *(human(one.floor, "s"), f"{one.share:.0%}"),
        ]
        for row in compared
        for method, one in (("dense", row.dense), ("squeezed", row.squeezed))
    ]
    header = ["case", "method", "measured", "predicted", "predicted ÷ measured", "floor", "share of the floor"]
    return _table(header, rows, text=2)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], text: int, bold: Any = None) -> str:
    def cells(values: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=text' if i < text else ''}>{html.escape(value)}</{tag}>" for i, value in enumerate(values)
        )

    lines = [f"<tr{' class=sum' if bold and bold(row) else ''}>{cells(row, 'td')}</tr>" for row in rows]
    return f"<table><tr>{cells(header, 'th')}</tr>{''.join(lines)}</table>"
