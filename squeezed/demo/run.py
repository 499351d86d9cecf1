"""The demo itself: prepare the manual once, ask five questions of it dense and squeezed, print both side by side."""

from __future__ import annotations

import shlex
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from squeezed.answer import Answer, Decoding, ask
from squeezed.cli.progress import Stages
from squeezed.context import FixedContext
from squeezed.demo import manual_path, questions
from squeezed.demo.fetch import cache_root, demo_model
from squeezed.errors import InputError
from squeezed.models import load_model

_DECODING = Decoding(max_new_tokens=48)


def run(sparsity: float, output: Console, messages: Console) -> None:
    """Build the demo's context if it is not there yet, then ask. Raises InputError if the model can't be had."""
    folder = cache_root() / "demo-context"
    with messages.status("loading SmolLM2-135M-Instruct"):
        model, tokenizer = load_model(str(demo_model()))
    try:
        context = FixedContext.load(folder, model, tokenizer)
        if "source" not in context.model or not context.text.endswith(
            manual_path().read_text(encoding="utf-8").strip()
        ):
            raise InputError("the manual has changed")
    except InputError:
        messages.print("Preparing the manual of the research station, once.")
        with Stages(messages) as stages:
            context = FixedContext.build(model, tokenizer, [manual_path()], on_progress=stages.update)
        # So that `squeeze ask` knows which model to load.
        replace(context, model={**context.model, "source": "demo"}).save(folder, replace_existing=True)
        context = FixedContext.load(folder, model, tokenizer)
    table = Table(title=f"{context.tokens:,} tokens asked five questions: dense, and squeezed at sparsity {sparsity:g}")
    for heading in ("question", "dense answer", "squeezed answer"):
        table.add_column(heading, ratio=3)
    for heading in ("kept", "KV budget", "dense s", "squeezed s"):
        table.add_column(heading, justify="right", no_wrap=True)

    def squeezed_answer(question: str, decoding: Decoding) -> Answer:
        # Select at this length too, where `squeeze ask` would read everything.
        return ask(model, tokenizer, context, [question], sparsity, decoding=decoding, adaptive=False, whole=True)[0]

    squeezed_answer("Hello?", Decoding(max_new_tokens=2))  # compiles the CPU loops
    right = {"dense": 0, "squeezed": 0}
    with messages.status("asking"):
        for question in questions():
            dense = ask(model, tokenizer, context, [question.question], dense=True, decoding=_DECODING)[0]
            squeezed = squeezed_answer(question.question, _DECODING)
            right["dense"] += question.is_answered_by(dense.text)
            right["squeezed"] += question.is_answered_by(squeezed.text)
            table.add_row(
                question.question,
                dense.text,
                squeezed.text,
                f"{squeezed.kept_fraction:.1%}",
                f"{squeezed.kv_budget:.3f}",
                _seconds(dense),
                _seconds(squeezed),
            )
    output.print(table)
    output.print(
        f"Right: dense {right['dense']} of {len(questions())}, squeezed {right['squeezed']} of {len(questions())}. "
        "No answer prefilled the manual again. Below some 10,000 tokens reading every key is faster on a CPU, and "
        "`squeeze ask` then does so, unless told --no-adaptive. "
        f"Ask it yourself: squeeze ask {shlex.quote(str(folder))} QUESTION",
        soft_wrap=True,  # so that the command can be copied
    )


def _seconds(answer: Answer) -> str:
    return f"{answer.seconds['total']:.2f}"
