"""The `squeeze` command. Thin: each command reads its arguments, calls the library and prints."""

from __future__ import annotations

import errno
import os
import signal
import sys
from typing import Any

# The compiled CPU loops and torch have an OpenMP pool each. Threads that spin for long while they wait keep the other
# pool's from running, and threads that sleep at once take long to wake: spin for some 50 microseconds, then sleep.
# This has to be said before torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# The hub's client warns about every retry; what comes of them is told in one line.
os.environ.setdefault("HF_HUB_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# transformers reads GGUF files behind a bar that none of its own switches reaches.
os.environ.setdefault("TQDM_DISABLE", "1")

import typer
from rich.console import Console

from squeezed.errors import InputError

app = typer.Typer(
    name="squeeze",
    help="Ask many questions of one long text: prepared once, each answer reads only what matters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench_app = typer.Typer(help="Time attention and generation against the fastest dense way here.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

# No markup: brackets in questions, answers and names are their own.
output = Console(markup=False, emoji=False)
messages = Console(stderr=True, markup=False, emoji=False)


def main() -> None:
    """Entry point: 0 on success, 2 and one line on bad usage or bad input."""
    from squeezed.cli import (  # noqa: F401  (each registers its command)
        ask,
        bench,
        build,
        compare,
        eval,
        extend,
        inspect,
        roofline,
    )

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        status = app(standalone_mode=False)
        sys.stdout.flush()  # what can't be written should show here, not at the interpreter's end
    except InputError as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; nothing half-written was left behind")
    except BrokenPipeError:
        _drop_output()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _drop_output()
            _fail(f"{error.filename or 'output'} can't be written: {error.strerror}; free some space")
        if error.errno != errno.ENAMETOOLONG:
            raise
        # A question where a file or folder belongs, as a rule.
        _fail(f"{error.filename} is too long for a file's name; give the path of a file or folder there")
    except Exception as error:
        # typer's own usage errors; some of its versions bring their own copy of click, so the class can't be named.
        if not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.exit(2)  # the help is on the screen already
        line = error.format_message().rstrip(".")
        cause: Any = error.__cause__
        if hasattr(cause, "errors"):  # pydantic's messages don't say what was found
            line += f", found {cause.errors()[0]['input']!r}"
        _fail(f"{line}. See squeeze --help.")
    else:
        if status == 130:  # how typer hands on an interrupt
            _fail("interrupted; nothing half-written was left behind")
        sys.exit(status or 0)


def _fail(line: str) -> None:
    messages.print(f"squeeze: {' '.join(line.split())}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(2)


def _drop_output() -> None:
    """What is left to write would fail again when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt
