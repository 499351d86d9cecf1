"""Reading a suite's data: a local folder, or the Hugging Face hub where no folder is given."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from squeezed.errors import InputError
from squeezed.text import read_files

TEXT_SUFFIXES = (".md", ".txt", ".rst", ".markdown", ".text")
ESSAYS = "PaulGrahamEssays.json"  # RULER's, {"text": all essays in one string}
_MONTH = "January|February|March|April|May|June|July|August|September|October|November|December"
_DATED = re.compile(rf"((?:{_MONTH}) \d{{4}})(?=[A-Z(\"])")  # January 2015Corporate
_JOINED = re.compile(
    r"(?:(?<=[a-z\d)\]][.!?])|(?<=[A-Z]{2}[.!?])|(?<=\w[.!?][\"')]))"  # the end of a sentence, and then
    r"(?=[A-Z(\"]|(?:Notes?)?\[\d+\]\s?[A-Z])"  # the next at once: mistakes.If, compass.[5] Donald
)


def folder(data: Path | None, needs: str) -> Path:
    """`data`, checked to be a folder.

    Raises:
        InputError: none was given, or it is no folder.
    """
    if data is None:
        raise InputError(f"no data folder was given; expected --data with {needs}")
    if not data.is_dir():
        raise InputError(f"{data} is not a folder; expected {needs}")
    return data


@lru_cache(maxsize=4)
def read_json(path: Path) -> Any:
    """A JSON file's content.

    Raises:
        InputError: a file that does not exist or is not JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; expected it in the data folder") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} can't be read as JSON ({error}); fetch it again") from error


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file with one JSON object a line.

    Raises:
        InputError: a line that is not a JSON object.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}:{number} is not JSON ({error.msg}); expected one object a line") from error
            if not isinstance(record, dict):
                raise InputError(f"{path}:{number} is a {type(record).__name__}; expected one object a line")
            yield record


def text_files(data: Path) -> list[Path]:
    """All text and Markdown files in a folder and its subfolders, by name; the file itself if `data` is one.

    Raises:
        InputError: there are none.
    """
    if data.is_file():
        return [data]
    found = sorted(
        path
        for path in data.rglob("*")
        if path.is_file() and (path.suffix.lower() in TEXT_SUFFIXES or path.name == ESSAYS)
    )
    if not found:
        raise InputError(f"{data} has no text files; expected some that end in {', '.join(TEXT_SUFFIXES)}")
    return found


def read_text(path: Path) -> str:
    """A text file's content, ends stripped; RULER's essays with their paragraphs apart again.

    Raises:
        InputError: a file that does not exist, is empty or is not UTF-8.
    """
    if path.name == ESSAYS:
        return _JOINED.sub("\n\n", _DATED.sub(r"\1\n\n", read_essays(path)))
    return read_files([path])[0]


def read_essays(path: Path) -> str:
    """RULER's essays as they are.

    Raises:
        InputError: a file that does not exist or has no text.
    """
    content = read_json(path)
    text = content.get("text") if isinstance(content, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{path} has no text; expected an object with the key 'text'")
    return text
