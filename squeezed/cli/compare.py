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
    from squeezed.evaluation.compare import compare_runs

    found = compare_runs(first, second, against, by_task)
    if as_json:
        print(json.dumps({"differences": [difference.to_dict() for difference in found]}, indent=1))
        return
    # As Markdown, because it is wide and wants to be passed on.
    names = (
        "where",
        "first",
        "mean",
        "second",
        "mean",
        "difference",
        "95%",
        "pairs that differ",
        "p (Holm)",
        "verdict",
    )
    output.print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}", highlight=False, soft_wrap=True)
    for one in found:
        digits = 1 if max(abs(one.first_mean), abs(one.second_mean)) > 1.5 else 4
        cells = (
            one.group,
            one.first,
            f"{one.first_mean:.{digits}f}",
            one.second,
            f"{one.second_mean:.{digits}f}",
            f"{one.difference:+.{digits}f}",
            f"{one.low:+.{digits}f} to {one.high:+.{digits}f}",
            f"{one.differing} of {one.samples}",
            f"{one.p_holm:.2g}",
            one.verdict,
        )
        colour = {"better": "green", "worse": "red"}.get(one.verdict)
        output.print(f"| {' | '.join(cells)} |", style=colour, markup=False, highlight=False, soft_wrap=True)
