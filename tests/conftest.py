"""What all tests share: one thread, since tiny tensors gain nothing from more, and random models and contexts."""

from __future__ import annotations

import gc
import os
import signal
import sys

# Before torch and the compiled loops start their pools.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

from collections.abc import Iterator

import pytest
import tiny
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from squeezed.cli import main
from squeezed.context import FixedContext


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def gpu_memory_given_back() -> Iterator[None]:
    """So that several processes can test on one GPU."""
    yield
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def ended_by_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever ends a test run ends it: the command line would take the signal for its user's and fail a sound test."""
    monkeypatch.setattr("squeezed.cli._interrupt", signal.SIG_DFL)


@pytest.fixture(autouse=True)
def short_contexts_are_squeezed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU answering would read every key of contexts as short as the tests': see tests/ops/test_cpu_cost.py."""
    monkeypatch.setattr("squeezed.ops.cpu.cost.selecting_pays", lambda *arguments: True)


@pytest.fixture
def run_squeeze(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> tiny.Run:
    """`squeeze ...` in this process: exit status, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["squeeze", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as leaving:
            main()
        out, err = capfd.readouterr()
        return int(leaving.value.code or 0), out, err

    return run


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    return tiny.model("llama")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tokenizer()


@pytest.fixture(scope="session")
def context(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> FixedContext:
    return FixedContext.from_text(llama, tokenizer, tiny.text(), tiny.BUILD)
