"""squeeze compare"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from squeezed.cli import app, output
from squeezed.cli.options import JsonFlag

_MEANINGS = {
    "kl": "KL divergence of the next token's distribution from full attention's, in nats a token",
    "nll": "negative log-likelihood, in nats a token",
    "key_nll": "negative log-likelihood of a text's key tokens together, in nats",
}


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
    value = found[0].value
    if value in _MEANINGS:
        output.print(f"{value}: {_MEANINGS[value]}; lower is better\n", highlight=False, soft_wrap=True)
    digits = 1 if value == "score" else 4
    names = (
        "where",
        "first",
        f"mean {value}",
        "second",
        f"mean {value}",
        "difference",
        "95%",
        "pairs that differ",
        "p (Holm)",
        "verdict",
    )
    output.print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}", highlight=False, soft_wrap=True)
    for one in found:
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
        output.print(f"| {' | '.join(cells)} |", style=colour, highlight=False, soft_wrap=True)
