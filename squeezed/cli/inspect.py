"""squeeze inspect"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from squeezed.cli import app, output
from squeezed.cli.options import JsonFlag


@app.command()
def inspect(
    context: Annotated[Path, typer.Argument(help="Folder that squeeze build wrote.")], as_json: JsonFlag = False
) -> None:
    """Show what a prepared context holds, and check every tensor against its checksum."""
    from squeezed.artifact import describe

    found = describe(context)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    _show(found)


def _show(found: dict[str, Any]) -> None:
    model = found["model"]
    output.print(found["folder"], style="bold", end="", highlight=False, soft_wrap=True)
    output.print(f": format {found['format']}, built {found['created']}", highlight=False, soft_wrap=True)
    output.print(
        f"model {model['type']} ({model['dtype']}), from {model.get('source', 'memory')}",
        highlight=False,
        soft_wrap=True,
    )
    output.print(
        f"{found['tokens']:,} tokens, the last {found['config']['window']} as window; "
        f"{found['bytes']:,} bytes on disk, {found['kv_bytes']:,} of them keys and values",
        highlight=False,
        soft_wrap=True,
    )
    files = Table("file", "characters", "tokens", title="Files")
    for part in found["parts"]:
        files.add_row(part["name"], "{:,} to {:,}".format(*part["characters"]), "{:,} to {:,}".format(*part["tokens"]))
    output.print(files)
    layers = Table("layer", "kind", "clusters per level", "keys per cluster", "checksums", title="Layers")
    for layer in found["layers"]:
        layers.add_row(
            str(layer["layer"]),
            layer["kind"],
            ", ".join(f"{low}" if low == high else f"{low} to {high}" for low, high in layer["clusters"]),
            "{} to {}".format(*layer["cluster_sizes"]) if layer["cluster_sizes"] else "",
            f"{layer['tensors']} tensors good",
        )
    output.print(layers)
    errors = found["thresholds"]["errors"]
    curve = Table(
        "sparsity",
        *[f"{count} queries" for count in found["thresholds"]["query_counts"]],
        *([] if errors is None else ["error"]),
    )
    curve.title = "Log score thresholds of the finest level, by queries that share a selection"
    for i, (sparsity, row) in enumerate(
        zip(found["thresholds"]["sparsities"], found["thresholds"]["finest"], strict=True)
    ):
        shown = [] if errors is None else [f"{errors[i]:.3f}"]
        curve.add_row(f"{sparsity:g}", *[f"{value:.3f}" for value in row], *shown)
    output.print(curve)
