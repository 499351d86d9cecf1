"""The hub's client and tqdm keep quiet beneath the command, unless its user wants to hear them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Nothing listens on that port.
_ASKS = """
import squeezed.cli
from huggingface_hub.utils import http_backoff
try:
    http_backoff("HEAD", "http://127.0.0.1:9/", max_retries=0)
except Exception:
    print("not reached")
"""


@pytest.mark.parametrize(("wish", "loud"), [(None, False), ("warning", True)])
def test_a_hub_that_can_not_be_reached_warns_only_who_asked_for_it(wish: str | None, loud: bool) -> None:
    inherited = {name: value for name, value in os.environ.items() if name != "HF_HUB_VERBOSITY"}
    inherited["NO_PROXY"] = "127.0.0.1"
    environment = inherited if wish is None else {**inherited, "HF_HUB_VERBOSITY": wish}
    done = subprocess.run([sys.executable, "-c", _ASKS], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "not reached\n"
    assert ("thrown while requesting HEAD" in done.stderr) == loud
    assert loud or done.stderr == ""


@pytest.mark.parametrize(("wish", "loud"), [(None, False), ("", True)])
def test_a_bar_is_shown_only_to_who_asked_for_it(wish: str | None, loud: bool) -> None:
    inherited = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    environment = inherited if wish is None else {**inherited, "TQDM_DISABLE": wish}
    code = "import squeezed.cli\nfrom tqdm.auto import tqdm\nlist(tqdm([1]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert ("1/1" in done.stderr) == loud
    assert loud or done.stderr == ""
