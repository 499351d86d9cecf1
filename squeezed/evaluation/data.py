"""Reading a suite's data: a local folder, or the Hugging Face hub where no folder is given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from squeezed.errors import InputError

TEXT_SUFFIXES = (".md", ".txt", ".rst", ".markdown", ".text")


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
    found = sorted(path for path in data.rglob("*") if path.suffix.lower() in TEXT_SUFFIXES and path.is_file())
    if not found:
        raise InputError(f"{data} has no text files; expected some that end in {', '.join(TEXT_SUFFIXES)}")
    return found


def read_text(path: Path) -> str:
    """A text file's content, ends stripped.

    Raises:
        InputError: a file that does not exist, is empty or is not UTF-8.
    """
    from squeezed.text import read_files

    return read_files([path])[0]
