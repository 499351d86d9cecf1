"""squeeze bench attention, build, clusters, generate, needle"""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from squeezed.cli import bench_app, messages, output
from squeezed.cli.options import Copying, Device, DType, JsonFlag, Recall, load, parse_dtype, resolve_device
from squeezed.errors import InputError

if TYPE_CHECKING:
    from squeezed.config import BuildConfig


@bench_app.command()
def attention(
    device: Device = "auto",
    context: Annotated[list[int] | None, typer.Option(help="Tokens of fixed context. Repeatable. [128K]")] = None,
    q_heads: Annotated[int, typer.Option(help="Query heads.")] = 32,
    kv_heads: Annotated[list[int] | None, typer.Option(help="KV heads. Repeatable. [8]")] = None,
    head_dim: Annotated[int, typer.Option(help="Dimension of a head.")] = 128,
    queries: Annotated[list[int] | None, typer.Option(help="Tokens asked at once. Repeatable. [1, decoding]")] = None,
    sparsity: Annotated[
        list[float] | None, typer.Option(help="Share of the keys to leave out, 0 to 1. Repeatable. [0.9]")
    ] = None,
    levels: Annotated[list[int] | None, typer.Option(help="Cluster levels. Repeatable. [1]")] = None,
    preset: Annotated[
        str, typer.Option(help="How the context is stored: paper, best (ours), or on a GPU compact.")
    ] = "paper",
    eight_bits: Annotated[bool, typer.Option("--eight-bits", help="Keys and values in 8 bits too. GPU.")] = False,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="All of the published comparison where nothing is given.")
    ] = False,
    dtype: DType = "auto",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder for attention.json and attention.png.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """One layer's attention to a fixed context, selection included, against the fastest dense way."""
    from squeezed.bench.attention import Sweep, time_on_cpu
    from squeezed.config import check_sparsity

    default = Sweep.published() if sweep else Sweep()
    asked = Sweep(
        contexts=tuple(context or default.contexts),
        heads=tuple((q_heads, count) for count in kv_heads) if kv_heads else default.heads,
        head_dim=head_dim,
        queries=tuple(queries or default.queries),
        sparsities=tuple(check_sparsity(value) for value in sparsity or default.sparsities),
        levels=tuple(levels or default.levels),
        dtype=parse_dtype(dtype),
        preset=preset,
        eight_bits=eight_bits,
    )
    place = resolve_device(device)
    rows: list[dict[str, Any]] = []
    run = {"device": _device_name(place), **_versions(), "rows": rows}
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{out} can't be a folder ({error.strerror}); give another to -o") from error
    with messages.status("planting keys") as status:
        if place.startswith("cuda"):
            from squeezed.bench.device_attention import time_on_device

            timed = time_on_device(asked, status.update)
        else:
            timed = time_on_cpu(asked, status.update)
        for row in timed:
            rows.append(row)
            if out is not None:  # a sweep is long: what is done is kept
                (out / "attention.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    if out is not None:
        from squeezed.bench.plots import plot_speedups

        plot_speedups(run, out / "attention.png")
    if as_json or len(rows) == 1:
        _print(run, as_json)
    else:
        _print_speedups(run)


@bench_app.command()
def build(
    device: Device = "auto",
    context: Annotated[list[int] | None, typer.Option(help="Tokens of fixed context. Repeatable. [128K]")] = None,
    q_heads: Annotated[int, typer.Option(help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(help="KV heads.")] = 8,
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 32,
    head_dim: Annotated[int, typer.Option(help="Dimension of a head.")] = 128,
    clusters: Annotated[float, typer.Option(help="Clusters as a share of the keys.")] = 0.05,
    levels: Annotated[int, typer.Option(help="Cluster levels, 1 to 3.")] = 1,
    preset: Annotated[str, typer.Option(help="best: ours; compact: keys in 8 bits; paper: as published.")] = "best",
    dtype: DType = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Clustering and calibration of a whole context, by stage; prefill is not counted."""
    import torch

    from squeezed.bench.build import BuildCase, time_build
    from squeezed.config import find_preset

    place = resolve_device(device)
    kind = parse_dtype(dtype) or (torch.bfloat16 if place.startswith("cuda") else torch.float32)
    config = replace(find_preset(preset), clusters=clusters, levels=levels)
    rows = []
    with messages.status("planting keys") as status:
        for tokens in context or [131072]:
            case = BuildCase(tokens, q_heads, kv_heads, layers, head_dim, kind, config)
            rows.append(time_build(case, place, status.update))
    _print({"device": _device_name(place), **_versions(), "rows": rows}, as_json)


@bench_app.command()
def generate(
    model: Annotated[str, typer.Option(help="Local transformers folder, .gguf file, hub name, or demo.")] = "demo",
    shape: Annotated[
        str | None, typer.Option(help="Instead of a model, random weights of a shape, such as llama-3.1-8b. GPU only.")
    ] = None,
    file: Annotated[list[str] | None, typer.Option("--file", help="Text; the demo's manual if left out.")] = None,
    context: Annotated[
        list[int] | None, typer.Option(help="Tokens of fixed context; the text is repeated or cut to it. Repeatable.")
    ] = None,
    question: Annotated[list[str] | None, typer.Option("--question", help="May be given several times.")] = None,
    question_tokens: Annotated[int, typer.Option(help="Of a random question, with --shape.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate per question.")] = 64,
    sparsity: Annotated[float, typer.Option(help="Share of the keys to leave out, 0 to 1.")] = 0.9,
    levels: Annotated[int, typer.Option(help="Cluster levels, 1 to 3.")] = 1,
    preset: Annotated[
        str | None, typer.Option(help="best: ours; paper: as published. [best; paper with --shape]")
    ] = None,
    recall: Recall = None,
    copying: Copying = None,
    device: Device = "auto",
    dtype: DType = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Whole answers: time to first token and tokens per second, dense and squeezed."""
    from squeezed.config import check_sparsity, find_preset
    from squeezed.context import check_questions

    check_sparsity(sparsity)
    if question:
        check_questions(question)
    if new_tokens < 2:
        raise InputError(f"new-tokens is {new_tokens}: expected at least 2, to time those after the first")
    preset = preset or ("paper" if shape else "best")
    given: dict[str, Any] = {"recall": recall, "copying": copying}
    given = {name: value for name, value in given.items() if value is not None}
    config = replace(find_preset(preset), levels=levels, **given)
    if config.key_bits == 8:
        raise InputError(
            f"preset is {preset}, which keeps no 16-bit keys to time dense answers with: expected best or paper; "
            "for its speed see bench attention"
        )
    place = resolve_device(device)
    if shape is None:
        rows = _generate_with(model, file, context or [7500], question, new_tokens, sparsity, config, place, dtype)
    elif place.startswith("cuda"):
        import torch

        from squeezed.bench.generate import time_shape

        kind = parse_dtype(dtype) or torch.bfloat16
        with messages.status("starting") as status:
            rows = time_shape(
                shape, context or [131072], sparsity, config, question_tokens, new_tokens, place, kind, status.update
            )
    else:
        raise InputError("--shape times a GPU and there is none in use; leave it out, or pass --device cuda")
    rows = [{"preset": preset, **given, **row} for row in rows]
    run = {"device": _device_name(place), "model": shape or model, **_versions(), "rows": rows}
    _print(run, as_json)


def _generate_with(
    model: str,
    file: list[str] | None,
    contexts: list[int],
    question: list[str] | None,
    new_tokens: int,
    sparsity: float,
    config: BuildConfig,
    device: str,
    dtype: str,
) -> list[dict[str, Any]]:
    from squeezed.bench.generate import time_generation, time_generation_on_device
    from squeezed.cli.progress import Stages
    from squeezed.context import FixedContext
    from squeezed.demo import manual_path, questions
    from squeezed.text import fit_to_tokens, read_files

    lm, tokenizer = load(model, device, dtype)
    text, _ = read_files(file or [manual_path()])
    asked = question or [q.question for q in questions()]
    run = time_generation_on_device if device.startswith("cuda") else time_generation
    rows = []
    for tokens in contexts:
        with Stages(messages) as stages:
            fixed = FixedContext.from_text(
                lm, tokenizer, fit_to_tokens(tokenizer, text, tokens), config, True, stages.update
            )
        with messages.status("timing") as status:
            rows.append(run(lm, tokenizer, fixed, asked, sparsity, new_tokens, status.update))
    return rows


@bench_app.command()
def clusters(
    model: Annotated[str, typer.Option(help="Local transformers folder, .gguf file, hub name, or demo.")] = "demo",
    file: Annotated[list[str] | None, typer.Option("--file", help="The text; the demo's manual if left out.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of it, at most.")] = 7800,
    windows: Annotated[int, typer.Option(help="Pieces to prefill apart, for more than the model takes.")] = 1,
    share: Annotated[float, typer.Option("--clusters", help="Clusters as a share of the keys.")] = 0.05,
    layer: Annotated[list[int] | None, typer.Option(help="Counted from 0. Repeatable. [2, 14]")] = None,
    device: Device = "auto",
    dtype: DType = "auto",
    as_json: JsonFlag = False,
) -> None:
    """How good the clusters of a model's own keys are, against scikit-learn's (if it is installed)."""
    from squeezed.bench.cluster_quality import QualityCase, judge_clusters
    from squeezed.demo import manual_path
    from squeezed.text import read_files

    case = QualityCase(share, tuple(layer or (2, 14)), windows)
    lm, tokenizer = load(model, device, dtype)
    text, _ = read_files(file or [manual_path()])
    ids = tokenizer(text, verbose=False).input_ids[:tokens]
    with messages.status("clustering in several ways"):
        rows = list(judge_clusters(lm, ids, case))
    run = {"device": lm.device.type, "model": model, **_versions(), "rows": rows}
    if as_json:
        print(json.dumps(run, indent=1))
        return
    table = Table("layer", "keys", "clusters", "way", "sum", "attention", "seconds", title="Clusters of a model's keys")
    for row in rows:
        found = (f"{row['sum']:.4f}", f"{row['attention']:.4f}", f"{row['seconds']:.1f}")
        table.add_row(str(row["layer"]), f"{row['keys']:,}", f"{row['clusters']:,}", row["way"], *found)
    output.print(table)


@bench_app.command()
def needle(
    model: Annotated[str, typer.Option(help="Local transformers folder, .gguf file, hub name, or demo.")] = "demo",
    file: Annotated[list[str] | None, typer.Option("--file", help="Haystack; the demo's manual if left out.")] = None,
    context: Annotated[int, typer.Option(help="Tokens, question and answer included.")] = 4096,
    depths: Annotated[int, typer.Option(help="Places to hide the needle, 2 to 10.")] = 10,
    sparsity: Annotated[list[float] | None, typer.Option(help="May be given several times.")] = None,
    levels: Annotated[list[int] | None, typer.Option(help="May be given several times.")] = None,
    preset: Annotated[str, typer.Option(help="best: ours; compact: keys in 8 bits; paper: as published.")] = "best",
    device: Device = "auto",
    dtype: DType = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Find a fact hidden at ten depths of a text, dense and squeezed."""
    from squeezed.bench.needle import NeedleCase, find_needles
    from squeezed.config import check_sparsity, find_preset
    from squeezed.demo import manual_path
    from squeezed.text import read_files

    asked = tuple(check_sparsity(value) for value in sparsity or (0.7, 0.9, 0.95))
    case, config = NeedleCase(context, depths, asked, tuple(levels or (1, 2))), find_preset(preset)
    lm, tokenizer = load(model, device, dtype)
    text, _ = read_files(file or [manual_path()])
    with messages.status("preparing") as status:
        rows = find_needles(lm, tokenizer, text, case, config, status.update)
    run = {"device": lm.device.type, "model": model, "preset": preset, **_versions(), "rows": rows}
    if as_json:
        print(json.dumps(run, indent=1))
        return
    table = Table("method", "sparsity", "found", "by depth", "kept", "KV budget", title=f"Needles in {context} tokens")
    for row in rows:
        table.add_row(
            row["method"],
            "" if row["sparsity"] is None else f"{row['sparsity']:g}",
            f"{row['found']} of {row['of']}",
            row["by_depth"],
            f"{row['kept_fraction']:.1%}",
            f"{row['kv_budget']:.3f}",
        )
    output.print(table)


def _device_name(place: str) -> str:
    import torch

    return torch.cuda.get_device_name(place) if place.startswith("cuda") else place


def _versions() -> dict[str, str]:
    import torch
    import transformers

    return {"date": date.today().isoformat(), "torch": torch.__version__, "transformers": transformers.__version__}


def _print_speedups(run: dict[str, Any]) -> None:
    names = (
        "context",
        "heads",
        "queries",
        "sparsity",
        "dense ms",
        "ours ms",
        "speed-up",
        "budget",
        "of floor",
        "error",
    )
    table = Table(*names, title=f"attention on {run['device']}", padding=(0, 1), box=None, header_style="bold")
    for row in run["rows"]:
        table.add_row(
            f"{row['context']}",
            f"{row['q_heads']}/{row['kv_heads']}",
            f"{row['queries']}",
            f"{row['sparsity']:g}" + (" hier" if row["levels"] == 2 else ""),
            f"{row['dense']['ms']:.4g}",
            f"{row['squeezed']['ms']:.4g}",
            f"{row['speedup']:.2f}x",
            f"{row['kv_budget']:.3f}",
            "" if row.get("floor_ms") is None else f"{row['floor_ms'] / row['squeezed']['ms']:.0%}",
            f"{row['rel_error']:.2g}",
        )
    output.print(table)


def _print(run: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(run, indent=1))
        return
    for row in run["rows"]:
        table = Table("what", "value", title=f"{Path(run.get('model', '')).name} on {run['device']}".strip())
        for name, value in row.items():
            table.add_row(name, _in_words(value))
        output.print(table)


def _in_words(value: Any) -> str:
    """{"ms": 5.25, "stages": {"score": 1.5}} as "ms 5.25, stages (score 1.5)"."""
    if isinstance(value, dict):
        parts = {k: f"({_in_words(v)})" if isinstance(v, dict) else _in_words(v) for k, v in value.items()}
        return ", ".join(f"{name} {part}" for name, part in parts.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
