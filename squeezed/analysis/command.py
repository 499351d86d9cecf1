"""`squeeze roofline`: where the time of a model goes on a device, and what squeezing the fixed context would save."""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from squeezed.errors import InputError

# The command line imports this module to print its help; torch and matplotlib are loaded once there is work to do.
if TYPE_CHECKING:
    from squeezed.analysis.measured import Comparison
    from squeezed.analysis.roofline import Launch
    from squeezed.analysis.study import Study


def roofline(
    model: Annotated[str, typer.Argument(help="Model folder, config.json, .gguf file or hub name.")],
    device: Annotated[
        str, typer.Option(help="Device of the catalogue, or cpu or cuda to measure this machine.")
    ] = "H100",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures, page and numbers.")] = Path(
        "roofline"
    ),
    measured: Annotated[
        Path | None, typer.Option(help="A file of `squeeze bench --json` to lay over the prediction.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences, each with its own context.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens of fixed context.")] = 131072,
    queries: Annotated[int, typer.Option(help="Tokens of user input.")] = 1024,
    tokens: Annotated[int, typer.Option(help="Tokens generated.")] = 128,
    sparsity: Annotated[float, typer.Option(help="Share of the clustered keys that is not attended.")] = 0.9,
    weight_bytes: Annotated[
        float | None, typer.Option(help="Bytes per weight; as the device computes if left out.")
    ] = None,
    kv_bytes: Annotated[float | None, typer.Option(help="Bytes per KV element; likewise.")] = None,
    eager: Annotated[
        bool, typer.Option("--eager", help="Fixed costs of eager calls instead of a captured graph.")
    ] = False,
) -> None:
    """Arithmetic intensity and roofline of MODEL: predicted time dense and squeezed, what pays and what fits."""
    from squeezed.analysis.cost import Precision
    from squeezed.analysis.devices import find_device
    from squeezed.analysis.measured import compare, read_run
    from squeezed.analysis.shape import shape_of
    from squeezed.analysis.source import load_config
    from squeezed.analysis.study import Study

    _check(batch=batch, length=length, queries=queries, tokens=tokens)
    _check_real(sparsity, weight_bytes, kv_bytes)
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: is a file; give a folder to -o")
    run = None if measured is None else read_run(measured)
    shape = shape_of(load_config(model), name=_name(model))
    chosen = find_device(device)
    width = chosen.element_bytes
    launch: Launch = "eager" if eager else "graph"
    study = Study(
        model=shape,
        device=chosen,
        precision=Precision(weight_bytes or width, kv_bytes or width, width),
        batch=batch,
        length=length,
        queries=queries,
        tokens=tokens,
        sparsity=sparsity,
        launch=launch,
    )
    compared = [] if run is None else compare(run, shape, chosen, study.precision, launch)
    measured_on = "" if run is None else run.device
    try:
        written = write(study, output, compared, measured_on, _command(model, study, measured))
    except OSError as error:
        raise InputError(f"{output}: can't be written ({error.strerror}); give another folder to -o") from error
    report(study, compared, written)


def write(study: Study, output: Path, compared: list[Comparison], measured_on: str, command: str) -> list[Path]:
    """Pictures, page and numbers into `output`; all of them are finished before the first one appears there."""
    from squeezed.analysis import decode_plots, plots
    from squeezed.analysis.page import page
    from squeezed.analysis.study import summary

    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        results = summary(study)
        images = [
            plots.save(plots.heat_maps(study), scratch / "heatmaps.png"),
            plots.save(plots.roofline(study), scratch / "roofline.png"),
            plots.save(decode_plots.time_per_token(study), scratch / "generation.png"),
            plots.save(decode_plots.limits(study), scratch / "limits.png"),
        ]
        if compared:
            picture = decode_plots.comparison(compared, measured_on)
            images.append(plots.save(picture, scratch / "measured.png"))
            results["measured"] = [_plain(row) for row in compared]
        (scratch / "roofline.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        text = page(study, results, images, compared, command)
        (scratch / "index.html").write_text(text, encoding="utf-8")
        output.mkdir(exist_ok=True)
        return [path.replace(output / path.name) for path in sorted(scratch.iterdir())]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def report(study: Study, compared: list[Comparison], written: list[Path]) -> None:
    """The answer on the terminal: times, speed-ups and limits."""
    from squeezed.analysis.study import METHODS, human, tokens_text

    console = Console(markup=False, emoji=False)
    console.print(
        f"{study.model.name} on {study.device.title}: ridge {study.device.ridge:.0f} FLOP/byte, "
        f"batch {study.batch}, context {tokens_text(study.length)}, sparsity {study.sparsity:g}"
    )
    table = Table("method", "time per token", "speed-up", "pays from", "largest context")
    base = study.token_seconds(study.length, "dense")
    for method in METHODS:
        seconds = study.token_seconds(study.length, method)
        pays = "" if method == "dense" else tokens_text(study.crossover(method))
        table.add_row(
            *(
                method,
                human(seconds, "s"),
                f"{base / seconds:.2f}",
                pays,
                tokens_text(study.largest_context(method), "no limit"),
            )
        )
    console.print(table)
    context = f"A context of {tokens_text(study.length)} tokens"
    if (largest := study.largest_context("dense")) is not None and study.length > largest:
        console.print(f"{context} does not fit in this device's memory.")
    if study.model.max_positions and study.length > study.model.max_positions:
        console.print(f"{context} is beyond the {tokens_text(study.model.max_positions)} positions of the model.")
    if compared:
        table = Table("measured case", "method", "measured", "predicted", "share of the floor")
        for row in compared:
            for method, one in (("dense", row.dense), ("squeezed", row.squeezed)):
                case = row.label.replace("\n", ", ")
                table.add_row(case, method, human(one.measured, "s"), human(one.predicted, "s"), f"{one.share:.0%}")
        console.print(table)
    console.print(f"Wrote {', '.join(path.name for path in written)} to {written[0].parent}")


def _check(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise InputError(f"--{name} is {value}, expected 1 or more")


def _check_real(sparsity: float, weight_bytes: float | None, kv_bytes: float | None) -> None:
    if not 0 <= sparsity <= 1:
        raise InputError(f"--sparsity is {sparsity:g}, expected a share from 0 to 1 (0.9 drops nine keys of ten)")
    for name, value in {"--weight-bytes": weight_bytes, "--kv-bytes": kv_bytes}.items():
        if value is not None and not 0 < value <= 8:
            raise InputError(f"{name} is {value:g}, expected more than 0 and at most 8 (2 for bfloat16)")


def _name(model: str) -> str:
    path = Path(model)
    if path.name == "config.json":
        return path.resolve().parent.name
    return path.stem if path.suffix in (".json", ".gguf") else path.name


def _command(model: str, study: Study, measured: Path | None) -> str:
    # Names, not paths: the page is meant to be passed on.
    options = f"--batch {study.batch} --length {study.length} --queries {study.queries} --tokens {study.tokens}"
    words = ["roofline", Path(model).name, "--device", study.device.name, *options.split()]
    words += ["--sparsity", f"{study.sparsity:g}", *([] if measured is None else ["--measured", measured.name])]
    return f"squeeze {shlex.join(words)}"


def _plain(row: Comparison) -> dict[str, object]:
    timings = {"dense": row.dense, "squeezed": row.squeezed}
    return {
        "case": row.label.replace("\n", ", "),
        **{name: {**vars(timing), "share": timing.share} for name, timing in timings.items()},
    }
