"""squeeze ask, squeeze demo"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from squeezed.cli import app, messages, output
from squeezed.cli.options import Device, DType, JsonFlag, load_built_with, parse_dtype, resolve_device, source_of
from squeezed.errors import InputError


@app.command()
def ask(
    context: Annotated[Path, typer.Argument(help="Folder that squeeze build wrote.")],
    questions: Annotated[
        list[str] | None, typer.Argument(help="Questions; none starts a conversation on standard input.")
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Share of the keys to leave out, 0 to 1; 0.9 unless --error is given.")
    ] = None,
    error: Annotated[
        float | None,
        typer.Option(help="Instead of a sparsity: the attention output's relative error to stay at, such as 0.05."),
    ] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Attend to everything, for comparison.")] = False,
    as_json: JsonFlag = False,
    follow_up: Annotated[bool, typer.Option("--follow-up", help="Questions are turns of one conversation.")] = False,
    batch: Annotated[bool, typer.Option("--batch", help="Answer all questions at once.")] = False,
    model: Annotated[str | None, typer.Option(help="Where the model is now, if it has moved.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy; above it samples.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus to sample from.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
    adaptive: Annotated[
        bool,
        typer.Option(
            help="Read every key where selecting would take longer than it saves: for a short question's tokens, and "
            "in short contexts."
        ),
    ] = True,
    verify: Annotated[bool, typer.Option(help="Compare checksums before answering.")] = True,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Ask questions of a prepared context."""
    from squeezed import answer
    from squeezed.artifact import load as load_context
    from squeezed.artifact import read_manifest
    from squeezed.config import check_sparsity
    from squeezed.context import check_questions
    from squeezed.warm_up import warm_up

    if sparsity is not None and error is not None:
        raise InputError("--sparsity and --error exclude each other: an error is reached by choosing the sparsity")
    if dense and (sparsity is not None or error is not None):
        given = "--error" if sparsity is None else "--sparsity"
        raise InputError(f"--dense and {given} exclude each other: dense attends to everything")
    sparsity = check_sparsity(0.9 if sparsity is None else sparsity)
    decoding = answer.Decoding(max_new_tokens, temperature, top_p, seed)
    if batch and follow_up:
        raise InputError("--batch and --follow-up exclude each other: turns of a conversation come one after another")
    if batch and not questions:
        raise InputError(
            "--batch answers the questions after the context and there are none; give some, or leave it out"
        )
    if questions:
        check_questions(questions)
    manifest = read_manifest(context)
    source = source_of(context, manifest, model)
    if resolve_device(device) == "cpu":
        warm_up(parse_dtype(manifest.model["dtype"]), manifest.config)
    fixed = load_context(context, verify)
    if error is not None:
        sparsity = fixed.curves.sparsity_for(error)
    lm, tokenizer = load_built_with(source, manifest, model, device, dtype)
    fixed.check_belongs_to(lm, tokenizer)
    if questions and not batch:
        answer.check_room(lm, tokenizer, fixed, questions)
    fixed = fixed.to(lm.device) if lm.device.type != "cpu" else fixed

    def show(result: answer.Answer) -> None:
        if as_json:
            print(json.dumps(result.to_dict()), flush=True)
        else:
            output.print(_cost(result), style="dim", soft_wrap=True)

    stream = None if as_json else _write
    if batch and questions:
        for result in answer.ask(lm, tokenizer, fixed, questions, sparsity, dense, decoding, adaptive=adaptive):
            if not as_json:
                output.print(result.question, style="bold", highlight=False, soft_wrap=True)
                print(result.text, flush=True)
            show(result)
        return
    conversation = answer.Conversation(lm, tokenizer, fixed, sparsity, dense, decoding, adaptive=adaptive)
    for question in questions or _typed():
        if not as_json and questions:
            output.print(question, style="bold", highlight=False, soft_wrap=True)
        if follow_up or not questions:
            result = conversation.ask(question, stream)
        else:
            (result,) = answer.ask(
                lm, tokenizer, fixed, [question], sparsity, dense, decoding, stream, adaptive=adaptive
            )
        if not as_json:
            print()
        show(result)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _typed() -> Any:
    """Questions from standard input, with a prompt if a person types them."""
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            messages.print("ask> ", end="", style="bold")
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise InputError(f"standard input is not UTF-8 ({error.reason}); convert it to UTF-8") from error
        if not line:
            return
        if line.strip():
            yield line.strip()


def _cost(result: Any) -> str:
    seconds = result.seconds
    cost = (
        f"each token read {result.kept_fraction:.1%} of the keys, KV budget {result.kv_budget:.3f}, "
        f"first token {seconds['first_token']:.2f} s, {result.tokens} tokens in {seconds['total']:.2f} s"
    )
    if result.path != "transformers" and not result.path.endswith("graph"):
        cost += f"; no CUDA graph: {result.path}"
    return cost


@app.command()
def demo(sparsity: Annotated[float, typer.Option(help="Share of the keys to leave out, 0 to 1.")] = 0.9) -> None:
    """Prepare a small manual with SmolLM2-135M and ask it five questions, dense and squeezed."""
    from squeezed.demo.run import run

    run(sparsity, output, messages)
