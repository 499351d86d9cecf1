"""What the documentation shows, works: its Python, its commands' options and methods, its links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import tiny
import typer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from squeezed.evaluation.methods import find_method

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
_COMMAND = re.compile(r"^    squeeze .*(?:\n {6,}-.*|(?<=\\)\n {5,}\S.*)*", re.MULTILINE)


def commands() -> list[tuple[str, list[str]]]:
    """Every indented `squeeze ...` of the pages, with the lines that go on with it, as words."""
    found = []
    for page in PAGES:
        for match in _COMMAND.finditer(page.read_text(encoding="utf-8")):
            text = re.sub(r"\\\n|\n", " ", match[0])
            words = shlex.split(re.sub(r"[\[\]]", "", text), comments=True)
            found.append((f"{page.name}: {' '.join(words)[:60]}", words[1:]))
    return found


def test_the_pages_show_commands() -> None:
    assert len(commands()) > 40
    assert {words[0] for _, words in commands()} == {
        "build",
        "ask",
        "inspect",
        "extend",
        "eval",
        "compare",
        "bench",
        "roofline",
    }


@pytest.mark.parametrize(("where", "words"), commands(), ids=[where for where, _ in commands()])
def test_options_and_methods_that_a_page_shows_exist(where: str, words: list[str]) -> None:
    from squeezed import cli
    from squeezed.cli import ask, bench, build, compare, eval, extend, inspect, roofline  # noqa: F401

    command = typer.main.get_command(cli.app)
    while hasattr(command, "commands"):
        assert words[0] in command.commands, where
        command, words = command.commands[words[0]], words[1:]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for option, value in zip(words, [*words[1:], ""], strict=True):
        if option.startswith("-"):
            assert option.partition("=")[0] in known, where
        if option == "--methods":
            for method in value.rstrip(",").split(","):
                if method != "...":
                    find_method(method)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if "://" not in target and not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_the_python_of_a_page_runs(
    page: str,
    llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a small model and texts in the place of those that are named; block after block, as a reader would."""
    monkeypatch.chdir(tmp_path)
    llama.save_pretrained("model")
    tokenizer.save_pretrained("model")
    for name in ("part1.md", "part2.md"):
        Path(name).write_text(tiny.text())
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    there: dict[str, object] = {}
    for block in blocks:
        for name, small in (("demo", "model"), ("path/to/model", "model"), ("squeezed/demo/manual.md", "part1.md")):
            block = block.replace(f'"{name}"', f'"{small}"')
        exec(compile(block, page, "exec"), there)
    assert any(Path().glob("*.ctx"))
    assert capsys.readouterr().out.strip()
