"""Reading the files of a fixed context, and remembering where each one begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from squeezed.errors import InputError

_BETWEEN_FILES = "\n\n"


@dataclass(frozen=True)
class Part:
    """One file of the fixed context: its name and its span, in characters of the joined text and in tokens."""

    name: str
    characters: tuple[int, int]
    tokens: tuple[int, int] = (0, 0)


def read_files(paths: Sequence[str | Path]) -> tuple[str, list[Part]]:
    """Read text files and join them into one text.

    Returns:
        The text, and each file's place in it in characters.

    Raises:
        InputError: a file that does not exist, can't be read, is empty, or is not text in UTF-8.
    """
    if not paths:
        raise InputError("no file was given; name at least one text file")
    pieces, parts, at = [], [], 0
    for path in map(Path, paths):
        text = _read(path)
        pieces.append(text)
        parts.append(Part(path.name, (at, at + len(text))))
        at += len(text) + len(_BETWEEN_FILES)
    return _BETWEEN_FILES.join(pieces), parts


def _read(path: Path) -> str:
    if path.is_dir():
        raise InputError(f"{path} is a folder; name the text files in it")
    if not path.exists():
        raise InputError(f"{path} does not exist; name an existing text file")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}); check its permissions") from error
    if b"\0" in raw:
        raise InputError(f"{path} is a binary file; expected text in UTF-8, so convert it to text first")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start} is {raw[error.start]:#04x}); convert it to UTF-8 first"
        ) from error
    if not text.strip():
        raise InputError(f"{path} is empty; expected text")
    return text.strip()


def append_parts(text: str, parts: Sequence[Part], more: str, more_parts: Sequence[Part]) -> tuple[str, list[Part]]:
    """`more` behind `text`, joined as files are, and the places of all parts in characters."""
    text = text.rstrip()
    first = len(text) + len(_BETWEEN_FILES)
    moved = [Part(p.name, (p.characters[0] + first, p.characters[1] + first)) for p in more_parts]
    return text + _BETWEEN_FILES + more, [*parts, *moved]


def locate_parts(parts: Sequence[Part], spans: Sequence[tuple[int, int]], head: int) -> list[Part]:
    """Each file's span in tokens, given every token's span in characters and the characters before the text."""
    located = []
    for part in parts:
        first, last = part.characters[0] + head, part.characters[1] + head
        inside = [i for i, (begin, end) in enumerate(spans) if end > first and begin < last and end > begin]
        located.append(Part(part.name, part.characters, (inside[0], inside[-1] + 1) if inside else (0, 0)))
    return located


def fit_to_tokens(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> str:
    """`text` cut, or repeated and cut, to at most `tokens` tokens; for benchmarks of a certain length."""
    count = len(tokenizer(text, verbose=False)["input_ids"])
    text = "\n\n".join([text] * -(-tokens // count))
    spans = tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return text if len(spans) <= tokens else text[: spans[tokens - 1][1]]
