"""squeeze compare"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from squeezed.cli import app, output
from squeezed.cli.options import JsonFlag


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Folder that squeeze eval wrote.")],
    second: Annotated[Path, typer.Argument(help="Another, or the same: then its methods against full attention.")],
    against: Annotated[
        str | None,
        typer.Option(help="A row of the first run, such as quest@0.2, to hold all rows of the second against."),
    ] = None,
    by_task: Annotated[bool, typer.Option("--by-task", help="Each task by itself as well.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Which differences between two runs are larger than chance, sample by sample."""
    from rich.table import Table

    from squeezed.evaluation.compare import compare_runs

    found = compare_runs(first, second, against, by_task)
    if as_json:
        print(json.dumps({"differences": [difference.to_dict() for difference in found]}, indent=1))
        return
    table = Table(
        "group", "first", "mean", "second", "mean", "difference", "95%", "pairs", "differ", "p (Holm)", "verdict"
    )
    for one in found:
        digits = 1 if abs(one.first_mean) > 1.5 or abs(one.second_mean) > 1.5 else 4
        table.add_row(
            one.group,
            one.first,
            f"{one.first_mean:.{digits}f}",
            one.second,
            f"{one.second_mean:.{digits}f}",
            f"{one.difference:+.{digits}f}",
            f"{one.low:+.{digits}f} to {one.high:+.{digits}f}",
            str(one.samples),
            str(one.differing),
            f"{one.p_holm:.3g}",
            one.verdict,
            style=None if one.verdict == "within chance" else "green" if one.verdict == "better" else "red",
        )
    output.print(table)
