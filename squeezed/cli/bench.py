"""squeeze bench attention, squeeze bench generate"""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from squeezed.cli import bench_app, messages, output
from squeezed.cli.options import Device, DType, JsonFlag, load, parse_dtype, resolve_device
from squeezed.errors import InputError


@bench_app.command()
def attention(
    device: Device = "auto",
    context: Annotated[int, typer.Option(help="Tokens of fixed context.")] = 131072,
    q_heads: Annotated[int, typer.Option(help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(help="KV heads.")] = 8,
    head_dim: Annotated[int, typer.Option(help="Dimension of a head.")] = 128,
    queries: Annotated[int, typer.Option(help="Tokens asked at once; 1 is decoding.")] = 1,
    sparsity: Annotated[float, typer.Option(help="Share of the keys to leave out, 0 to 1.")] = 0.9,
    levels: Annotated[int, typer.Option(help="Cluster levels, 1 to 3.")] = 1,
    dtype: DType = "auto",
    as_json: JsonFlag = False,
) -> None:
    """One layer's attention to a fixed context, selection included, against the fastest dense way."""
    from squeezed.config import check_sparsity

    check_sparsity(sparsity)
    place = resolve_device(device)
    precision = parse_dtype(dtype)
    options: dict[str, Any] = {} if precision is None else {"dtype": precision}
    with messages.status("planting keys") as status:
        from squeezed.bench.attention import AttentionCase, time_attention

        if place.startswith("cuda"):
            from squeezed.bench.device_attention import time_on_device

            row = time_on_device(context, q_heads, kv_heads, head_dim, queries, sparsity, levels, **options)
        else:
            case = AttentionCase(context, q_heads, kv_heads, head_dim, queries, sparsity, levels, **options)
            row = time_attention(case, status.update)
    _print({"device": place, **_versions(), "rows": [row]}, as_json)


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
    device: Device = "auto",
    dtype: DType = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Whole answers: time to first token and tokens per second, dense and squeezed."""
    from squeezed.config import check_sparsity

    check_sparsity(sparsity)
    if new_tokens < 2:
        raise InputError(f"new-tokens is {new_tokens}: expected at least 2, to time those after the first")
    place = resolve_device(device)
    if shape is None:
        rows = _generate_with(model, file, context or [7500], question, new_tokens, sparsity, levels, place, dtype)
    elif place.startswith("cuda"):
        import torch

        from squeezed.bench.generate import time_shape

        kind = parse_dtype(dtype) or torch.bfloat16
        with messages.status("starting") as status:
            rows = time_shape(
                shape, context or [131072], sparsity, levels, question_tokens, new_tokens, place, kind, status.update
            )
    else:
        raise InputError("--shape times a GPU and there is none in use; leave it out, or pass --device cuda")
    run = {"device": _device_name(place), "model": shape or model, **_versions(), "rows": rows}
    _print(run, as_json)


def _generate_with(
    model: str,
    file: list[str] | None,
    contexts: list[int],
    question: list[str] | None,
    new_tokens: int,
    sparsity: float,
    levels: int,
    device: str,
    dtype: str,
) -> list[dict[str, Any]]:
    from squeezed.bench.generate import time_generation, time_generation_on_device
    from squeezed.cli.progress import Stages
    from squeezed.config import BuildConfig
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
                lm, tokenizer, fit_to_tokens(tokenizer, text, tokens), BuildConfig(levels=levels), True, stages.update
            )
        with messages.status("timing") as status:
            rows.append(run(lm, tokenizer, fixed, asked, sparsity, new_tokens, status.update))
    return rows


@bench_app.command()
def needle(
    model: Annotated[str, typer.Option(help="Local transformers folder, .gguf file, hub name, or demo.")] = "demo",
    file: Annotated[list[str] | None, typer.Option("--file", help="Haystack; the demo's manual if left out.")] = None,
    context: Annotated[int, typer.Option(help="Tokens, question and answer included.")] = 4096,
    depths: Annotated[int, typer.Option(help="Places to hide the needle, 2 to 10.")] = 10,
    sparsity: Annotated[list[float] | None, typer.Option(help="May be given several times.")] = None,
    levels: Annotated[list[int] | None, typer.Option(help="May be given several times.")] = None,
    preset: Annotated[str, typer.Option(help="best: ours; paper: the published method.")] = "best",
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


def _print(run: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(run, indent=1))
        return
    for row in run["rows"]:
        table = Table("what", "value", title=f"{Path(run.get('model', '')).name} on {run['device']}".strip())
        for name, value in row.items():
            if isinstance(value, dict):
                value = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in value.items())
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
        output.print(table)
