"""squeeze eval"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from squeezed.cli import app, messages, output
from squeezed.cli.options import Device, DType, parse_dtype, resolve_device


@app.command(name="eval")
def evaluate(
    suite: Annotated[
        str, typer.Argument(help="A suite of questions such as ruler, or fidelity, perplexity or longppl on any text.")
    ],
    model: Annotated[str, typer.Option(help="Local transformers folder, .gguf file, hub name, or demo.")],
    folder: Annotated[Path, typer.Option("-o", "--output", help="Folder to write; a run there is continued.")],
    methods: Annotated[
        str, typer.Option(help="Separated by commas, options after a colon: squeezed,quest:page=32; all for all.")
    ] = "full,squeezed,squeezed-paper,quest,streaming,random,oracle",
    budget: Annotated[str, typer.Option(help="Shares of the full KV's bytes, separated by commas.")] = "0.1,0.2",
    length: Annotated[str, typer.Option(help="Tokens, question and answer included, separated by commas.")] = "4096",
    samples: Annotated[int, typer.Option(help="Per task and length.")] = 10,
    tasks: Annotated[str, typer.Option(help="Of the suite, separated by commas; all if left out.")] = "",
    data: Annotated[Path | None, typer.Option(help="Folder or file of the suite's texts.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that share the work, each with its own model.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    question: Annotated[
        str, typer.Option(help="How a question's own tokens are read: whole, or by the method, each: selects.")
    ] = "whole",
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Score methods on the same model, texts, questions and budgets; writes predictions, metrics, a table and plots."""
    from squeezed.errors import InputError
    from squeezed.evaluation.methods import METHODS
    from squeezed.evaluation.settings import TEXT_SUITES, RunConfig, RunFolder

    place = resolve_device(device)
    parse_dtype(dtype)
    if workers < 1:
        raise InputError(f"workers is {workers}: expected at least 1")
    if suite not in TEXT_SUITES:
        from squeezed.evaluation.suites import SUITES

        if suite not in SUITES:
            raise InputError(f"there is no suite {suite!r}; choose among {', '.join([*SUITES, *TEXT_SUITES])}")
    config = RunConfig(
        suite=suite,
        model=model,
        dtype=dtype,
        methods=tuple(METHODS) if methods == "all" else tuple(_split(methods)),
        budgets=_numbers("budget", budget, float),
        lengths=_numbers("length", length, int),
        samples=samples,
        tasks=tuple(_split(tasks)),
        data=str(data) if data else "",
        seed=seed,
        question=question,
    )

    from squeezed.cli.progress import Answers
    from squeezed.evaluation.harness import run
    from squeezed.evaluation.load import Loader
    from squeezed.evaluation.report import write_report

    try:
        with Answers(messages) as bar:
            run(config, folder, Loader(model, place, dtype, workers), workers, bar.update)
        write_report(folder)
    except KeyboardInterrupt:
        if answers := sum(1 for _ in RunFolder(folder).records()):
            raise InputError(
                f"interrupted with {answers} answers in {folder}; run the same command again to go on there"
            ) from None
        raise
    output.print((folder / "table.md").read_text("utf-8"), highlight=False, soft_wrap=True)
    written = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    output.print(f"Wrote {', '.join(written)} to {folder}", soft_wrap=True)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(name: str, text: str, kind: type) -> tuple:
    from squeezed.errors import InputError

    try:
        return tuple(kind(part) for part in _split(text))
    except ValueError as error:
        raise InputError(f"{name} is {text!r}: expected numbers separated by commas") from error
