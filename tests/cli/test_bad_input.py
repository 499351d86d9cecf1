"""Bad input of every kind: one line that names it, exit status 2, nothing half-written."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from squeezed import artifact
from squeezed.answer import ask
from squeezed.context import FixedContext
from squeezed.errors import InputError


@dataclass
class Command:
    """`squeeze` in this process: its exit status, its standard output, and the lines of its complaint."""

    run: Callable[..., tuple[int, str, list[str]]]
    folder: Path

    def refuses(self, *arguments: object) -> str:
        """Run, check that it fails as bad input does and leaves the folder as it was; the one line of complaint."""
        before = self.state()
        status, out, complaint = self.run(*arguments)
        assert status == 2, (out, complaint)
        assert len(complaint) == 1, complaint
        assert complaint[0].startswith("squeeze: ")
        assert "Traceback" not in out
        assert self.state() == before
        return complaint[0]

    def state(self) -> dict[str, int]:
        """Every file and folder with its size."""
        return {str(path.relative_to(self.folder)): path.stat().st_size for path in self.folder.rglob("*")}


@pytest.fixture
def squeeze(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_squeeze: tiny.Run) -> Command:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, list[str]]:
        status, out, err = run_squeeze(*arguments)
        lines = err.splitlines()
        if status == 0 or any("prefill" in line for line in lines):  # the bars of stages that were begun
            lines = [line for line in lines if line.startswith("squeeze: ") or "Traceback" in line]
        return status, out, lines

    return Command(run, tmp_path)


@pytest.fixture(scope="session")
def model_folder(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def built(context: FixedContext, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dataclasses import replace

    folder = tmp_path_factory.mktemp("contexts") / "manual"
    replace(context, model={**context.model, "source": str(model_folder)}).save(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(tiny.text())
    return path


def test_a_good_build_and_question_exit_with_0(squeeze: Command, model_folder: Path, text: Path) -> None:
    status, _, complaint = squeeze.run("build", model_folder, text, "-o", "manual", "--window", 24)
    assert (status, complaint) == (0, [])
    status, out, _ = squeeze.run("ask", "manual", "Who?", "and the net?", "--json", "--max-new-tokens", 3)
    assert status == 0
    assert [json.loads(line)["question"] for line in out.splitlines()] == ["Who?", "and the net?"]
    assert squeeze.run("inspect", "manual")[0] == 0


FILES = {
    "no such file": (None, "does not exist"),
    "empty": (b"", "is empty"),
    "only white space": (b" \n\t\n", "is empty"),
    "binary": (bytes(range(256)) * 8, "binary"),
    "latin-1": ("für das Café ".encode("latin-1") * 99, "not UTF-8"),
    "utf-16": (("the net. " * 99).encode("utf-16"), "binary"),
    "too short": (b"the net.", "at least"),
    "too long": (tiny.text(9000).encode(), "more than fit"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_no_usable_text(case: str, squeeze: Command, model_folder: Path) -> None:
    content, reason = FILES[case]
    if content is not None:
        Path("input.txt").write_bytes(content)
    complaint = squeeze.refuses("build", model_folder, "input.txt", "-o", "out", "--window", 24)
    assert reason in complaint


def test_one_bad_file_among_good_ones_is_named(squeeze: Command, model_folder: Path, text: Path) -> None:
    Path("empty.txt").touch()
    assert "empty.txt" in squeeze.refuses("build", model_folder, text, "empty.txt", "-o", "out")


def test_a_folder_instead_of_a_file(squeeze: Command, model_folder: Path) -> None:
    Path("texts").mkdir()
    assert "is a folder" in squeeze.refuses("build", model_folder, "texts", "-o", "out")


def test_a_text_that_is_too_long_says_by_how_many_tokens(
    squeeze: Command, model_folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    Path("long.txt").write_text(tiny.text(9000))
    tokens = len(tokenizer(f"<|user|>{tiny.text(9000)}", add_special_tokens=False).input_ids)
    complaint = squeeze.refuses("build", model_folder, "long.txt", "-o", "out", "--window", 24)
    assert f"{tokens} tokens" in complaint
    assert f"{tokens - 4096 + 1} more" in complaint


def test_a_text_shorter_than_the_window_and_one_cluster_says_what_is_needed(
    squeeze: Command, model_folder: Path, text: Path
) -> None:
    complaint = squeeze.refuses("build", model_folder, text, "-o", "out", "--window", 300)
    assert "window of 300" in complaint


def test_a_model_folder_without_weights(squeeze: Command, text: Path, tmp_path: Path) -> None:
    tiny.FAMILIES["llama"]().save_pretrained(tmp_path / "model")
    assert "no weights" in squeeze.refuses("build", "model", text, "-o", "out")


def test_a_model_folder_without_a_tokenizer(squeeze: Command, text: Path, tmp_path: Path) -> None:
    tiny.model("llama").save_pretrained(tmp_path / "model")
    assert "can't be loaded" in squeeze.refuses("build", tmp_path / "model", text, "-o", "out")


@pytest.mark.parametrize("name", ["/no/such/model", "./missing", "gone.gguf"])
def test_a_model_that_is_not_there(name: str, squeeze: Command, text: Path) -> None:
    assert "does not exist" in squeeze.refuses("build", name, text, "-o", "out")


@pytest.mark.parametrize("content", [b"no such thing" * 100, b"GGUF\x03\x00\x00\x00"], ids=["another", "cut short"])
def test_a_gguf_file_that_is_none(content: bytes, squeeze: Command, text: Path) -> None:
    Path("model.gguf").write_bytes(content)
    assert "can't be loaded" in squeeze.refuses("build", "model.gguf", text, "-o", "out")


def test_a_text_file_in_the_place_of_the_model(squeeze: Command, text: Path) -> None:
    assert "is a file and no .gguf" in squeeze.refuses("build", "./text.txt", text, "-o", "out")


def test_timings_that_cannot_be_taken(squeeze: Command) -> None:
    Path("file").touch()
    bench = ("bench", "attention", "--device", "cpu", "--context", 1024)
    assert "File exists" in squeeze.refuses(*bench, "-o", "file")
    assert "Not a directory" in squeeze.refuses(*bench, "-o", "file/out")
    assert "timed on a GPU only" in squeeze.refuses(*bench, "--preset", "compact")
    assert "keeps no 16-bit keys" in squeeze.refuses("bench", "generate", "--preset", "compact")
    assert "a question is empty" in squeeze.refuses("bench", "generate", "--question", "")
    assert "context is 100: expected at least 512" in squeeze.refuses("bench", "needle", "--context", 100)


def test_a_configuration_that_is_no_json(squeeze: Command, text: Path) -> None:
    Path("model").mkdir()
    Path("model/config.json").write_text("{")
    Path("model/model.safetensors").touch()
    assert "can't be loaded" in squeeze.refuses("build", "./model", text, "-o", "out")


def test_an_unsupported_architecture(squeeze: Command, text: Path, tmp_path: Path) -> None:
    transformers.T5Config().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").touch()
    assert "t5 is an encoder-decoder" in squeeze.refuses("build", "./model", text, "-o", "out")


def test_an_architecture_that_nobody_knows(squeeze: Command, text: Path) -> None:
    Path("model").mkdir()
    Path("model/config.json").write_text('{"model_type": "squid"}')
    Path("model/model.safetensors").touch()
    assert "squid" in squeeze.refuses("build", "./model", text, "-o", "out")


SETTINGS = {
    "clusters above the keys": (["--clusters", "1.5"], "clusters is 1.5"),
    "more clusters than keys, as a number": (["--clusters", "100000"], "clusters is 100000"),
    "no clusters": (["--clusters", "0"], "clusters is 0"),
    "clusters nan": (["--clusters", "nan"], "clusters is nan"),
    "levels": (["--levels", "4"], "levels is 4"),
    "no window": (["--window", "0"], "window is 0"),
    "chunk": (["--chunk", "0"], "chunk is 0"),
    "preset": (["--preset", "worst"], "preset is 'worst'"),
    "device": (["--device", "abacus"], "device is 'abacus'"),
    "another device of torch's": (["--device", "meta"], "device is 'meta'"),
    "dtype": (["--dtype", "int4"], "dtype is 'int4'"),
    "not a number": (["--clusters", "many"], "'many'"),
    "unknown option": (["--quickly"], "--quickly"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_make_no_sense(case: str, squeeze: Command, model_folder: Path, text: Path) -> None:
    options, reason = SETTINGS[case]
    assert reason in squeeze.refuses("build", model_folder, text, "-o", "out", *options)


@pytest.mark.parametrize(
    "arguments", [["build"], ["ask"], ["inspect"], ["paint"], ["build", "demo"], ["inspect", "--quickly"]]
)
def test_commands_that_lack_something(arguments: list[str], squeeze: Command) -> None:
    complaint = squeeze.refuses(*arguments)
    assert ".." not in complaint
    assert complaint.endswith(". See squeeze --help.")


@pytest.mark.parametrize("sparsity", ["-0.1", "1.1", "nan", "inf", "most"])
def test_sparsity_outside_0_to_1(sparsity: str, squeeze: Command, built: Path) -> None:
    assert "sparsity" in squeeze.refuses("ask", built, "Who?", "--sparsity", sparsity)


QUESTIONS = {
    "empty": ([""], [], "empty"),
    "white space": (["  \n"], [], "empty"),
    "one of several": (["Who?", " "], ["--batch"], "empty"),
    "too long": (["the net " * 3000], [], "more than fit"),
    "no answer wanted": (["Who?"], ["--max-new-tokens", "0"], "max-new-tokens is 0"),
    "cold": (["Who?"], ["--temperature", "-1"], "temperature is -1"),
    "nan": (["Who?"], ["--temperature", "nan"], "temperature is nan"),
    "nucleus": (["Who?"], ["--top-p", "0"], "top-p is 0"),
    "seed": (["Who?"], ["--temperature", "1", "--seed", str(2**63)], f"seed is {2**63}"),
    "negative seed": (["Who?"], ["--seed", "-1"], "seed is -1"),
    "dtype": (["Who?"], ["--dtype", "int4"], "bfloat16, float16, auto"),
    "both": (["Who?"], ["--batch", "--follow-up"], "exclude"),
    "dense with a sparsity": (["Who?"], ["--dense", "--sparsity", "0.5"], "--dense and --sparsity exclude"),
    "dense with an error": (["Who?"], ["--dense", "--error", "0.05"], "--dense and --error exclude"),
    "a batch of none": ([], ["--batch"], "--batch answers"),
    "not UTF-8": (["caf\udce9"], [], "not UTF-8"),
    "a long one that is not UTF-8": (["the net " * 3000 + "\udce9"], [], "the net the ...' is not UTF-8"),
    "the mark of the text's place": (["\u2063fixed-context\u2063"], [], "take the two U+2063 out"),
}


@pytest.mark.parametrize("case", QUESTIONS)
def test_questions_that_cannot_be_asked(case: str, squeeze: Command, built: Path) -> None:
    questions, options, reason = QUESTIONS[case]
    complaint = squeeze.refuses("ask", built, *questions, *options, "--json")
    assert reason in complaint
    assert len(complaint) < 250
    assert "pass --model" not in complaint


def test_an_empty_question_is_refused_before_the_first_is_answered(squeeze: Command, built: Path) -> None:
    status, out, complaint = squeeze.run("ask", built, "Who?", "", "--max-new-tokens", 2)
    assert (status, out, complaint) == (2, "", ["squeeze: a question is empty; ask something"])


def test_a_text_in_the_place_of_a_list_of_questions(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, context: FixedContext
) -> None:
    with pytest.raises(InputError, match="expected a list of questions"):
        context.inputs(tokenizer, "Who?", sparsity=0.9)
    with pytest.raises(InputError, match="expected a list of questions"):
        ask(llama, tokenizer, context, "Who?")


@pytest.mark.parametrize("options", [[], ["--batch"], ["--follow-up"]])
def test_a_question_too_long_is_named_before_the_first_is_answered(
    options: list[str], squeeze: Command, built: Path
) -> None:
    status, out, complaint = squeeze.run("ask", built, "Who?", "the net " * 3000, "--max-new-tokens", 2, *options)
    assert (status, out) == (2, "")
    assert len(complaint) == 1
    assert "question 'the net the net" in complaint[0]
    assert "more than fit" in complaint[0]


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_standard_input_that_is_not_utf_8(
    errors: str, squeeze: Command, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = io.TextIOWrapper(io.BytesIO("für das Café?\n".encode("latin-1")), "utf-8", errors)
    monkeypatch.setattr(sys, "stdin", typed)
    assert "not UTF-8" in squeeze.refuses("ask", built)


@pytest.mark.parametrize("options", [[], ["--batch"]])
def test_brackets_and_colons_are_printed_as_they_are(options: list[str], squeeze: Command, built: Path) -> None:
    question = f"Where is it [/bold] [dim]called :smile:{' and the net' * 9}?"
    status, out, _ = squeeze.run("ask", built, question, "--max-new-tokens", 2, *options)
    assert status == 0
    assert out.splitlines()[0] == question
    assert "KV budget" in out.splitlines()[-1]
    assert " tokens in " in out.splitlines()[-1]


def test_names_with_brackets_are_printed_as_they_are(squeeze: Command, model_folder: Path, text: Path) -> None:
    named = text.rename(text.with_name("[red]a.txt"))
    assert squeeze.run("build", model_folder, named.name, "-o", "[/bold] ctx", "--window", 24)[0] == 0
    status, out, _ = squeeze.run("inspect", "[/bold] ctx")
    assert status == 0
    assert "[/bold] ctx: format" in out
    assert "[red]a.txt" in out


def test_a_question_that_is_too_long_says_by_how_many_tokens(
    squeeze: Command, built: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    complaint = squeeze.refuses("ask", built, "7" * 4000, "--json")
    prompt = f"<|user|>{tiny.text()}\n\n{'7' * 4000}<|end|><|assistant|>"
    used = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    assert f"{used} tokens" in complaint
    assert f"{used + 1 - 4096} more" in complaint  # one token at least is for the answer


def test_an_artefact_that_is_not_there(squeeze: Command) -> None:
    for command in (["ask", "nowhere", "Who?"], ["inspect", "nowhere"]):
        assert "not a fixed context" in squeeze.refuses(*command)


@pytest.mark.parametrize("command", ["ask", "inspect"])
def test_a_damaged_artefact(command: str, squeeze: Command, built: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(built, tmp_path / "manual")
    path = tmp_path / "manual" / "layer-001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 1
    path.write_bytes(raw)
    assert "layer-001.safetensors" in squeeze.refuses(command, "manual", *(["Who?"] if command == "ask" else []))


def test_an_artefact_of_another_model(squeeze: Command, built: Path, tmp_path: Path) -> None:
    tiny.model("llama", seed=1).save_pretrained(tmp_path / "other")
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    assert "model weights" in squeeze.refuses("ask", built, "Who?", "--model", tmp_path / "other")


def test_an_artefact_whose_model_has_moved(
    squeeze: Command, context: FixedContext, model_folder: Path, tmp_path: Path
) -> None:
    from dataclasses import replace

    replace(context, model={**context.model, "source": "/gone/llama"}).save(tmp_path / "manual")
    assert "--model" in squeeze.refuses("ask", "manual", "Who?")
    assert squeeze.run("ask", "manual", "Who?", "--model", model_folder, "--max-new-tokens", 1)[0] == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_artefact_asked_in_another_dtype(dtype: str, squeeze: Command, built: Path) -> None:
    complaint = squeeze.refuses("ask", built, "Who?", "--dtype", dtype)
    assert f"dtype is '{dtype}': the context was built in float32; leave --dtype out" in complaint


def test_an_existing_folder_is_refused_before_any_work(squeeze: Command, built: Path, text: Path) -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine")
    for target in ("out", text):
        for options in ([], ["--force"]):
            complaint = squeeze.refuses("build", "/no/such/model", text, "-o", target, *options)
            assert "not a fixed context; choose another folder" in complaint
            assert "--force" not in complaint
    assert "pass --force" in squeeze.refuses("build", "/no/such/model", text, "-o", built)


def test_a_build_that_starts_over_says_so(
    squeeze: Command, model_folder: Path, text: Path, run_squeeze: tiny.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    build = ("build", model_folder, text, "-o", "out", "--window")
    with monkeypatch.context() as patched:
        patched.setattr("squeezed.context.calibrate", interrupt)
        assert squeeze.run(*build, 24)[0] == 2
    status, _, said = run_squeeze(*build, 32)
    assert status == 0
    assert "after 3 layers; starting over: files, model or settings are not the same" in said
    assert "going on" not in said


def test_the_command_that_a_build_suggests_can_be_copied(
    model_folder: Path, text: Path, run_squeeze: tiny.Run, squeeze: Command
) -> None:
    status, _, said = run_squeeze("build", model_folder, text, "-o", "my books; all", "--window", 24)
    assert status == 0
    assert "Ask it: squeeze ask 'my books; all' QUESTION\n" in said


def test_a_full_disk(squeeze: Command, model_folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifact, "save_file", full)
    assert "full" in squeeze.refuses("build", model_folder, text, "-o", "out", "--window", 24)


def test_too_little_space_is_noticed_before_the_prefill(
    squeeze: Command, model_folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    monkeypatch.setattr(FixedContext, "from_text", None)
    assert "free some space" in squeeze.refuses("build", model_folder, text, "-o", "out", "--window", 24)


def test_a_place_that_cannot_be_written(squeeze: Command, model_folder: Path, text: Path) -> None:
    Path("file").touch()
    assert "can't be written" in squeeze.refuses("build", model_folder, text, "-o", "file/out")


def test_an_interrupt(squeeze: Command, model_folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    build = ("build", model_folder, text, "-o", "out", "--window", 24)
    with monkeypatch.context() as patched:
        patched.setattr("squeezed.streaming.prepare_layer", interrupt)
        assert "interrupted" in squeeze.refuses(*build)
    with monkeypatch.context() as patched:
        patched.setattr("squeezed.context.calibrate", interrupt)
        status, _, complaint = squeeze.run(*build)
    assert status == 2
    assert complaint == ["squeeze: interrupted after 3 finished layers; run the same command again to go on there"]
    assert sorted(path.name for path in squeeze.folder.iterdir()) == [".out.unfinished", "text.txt"]
    assert squeeze.run(*build)[0] == 0
    assert sorted(path.name for path in squeeze.folder.iterdir()) == ["out", "text.txt"]


def test_a_template_is_needed_unless_the_text_goes_on_plainly(
    squeeze: Command, llama: PreTrainedModel, text: Path, tmp_path: Path
) -> None:
    llama.save_pretrained(tmp_path / "model")
    tiny.tokenizer(template=None).save_pretrained(tmp_path / "model")
    assert "--raw" in squeeze.refuses("build", "./model", text, "-o", "out", "--window", 24)
    assert squeeze.run("build", "./model", text, "-o", "out", "--window", 24, "--raw")[0] == 0
    assert squeeze.run("ask", "out", " and", "--max-new-tokens", 2)[0] == 0


def test_the_installed_command_behaves_likewise(tmp_path: Path) -> None:
    command = Path(sys.executable).parent / "squeeze"
    if not command.is_file():
        pytest.skip("the package is not installed")
    done = subprocess.run(
        [command, "build", "/no/such/model", "missing.txt", "-o", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "squeeze: missing.txt does not exist; name an existing text file\n"
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "BUILT", "--json"]])
def test_an_output_that_is_full(arguments: list[str], built: Path) -> None:
    command = [sys.executable, "-c", "from squeezed.cli import main; main()"]
    command += [part.replace("BUILT", str(built)) for part in arguments]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "squeeze: output can't be written: No space left on device; free some space\n"


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_a_question_where_a_path_belongs_is_refused(squeeze: Command, text: Path, place: int) -> None:
    question = "Which fluid do I need, and how much of it? " * 10
    commands = (
        ("build", "/no/such/model", question, "-o", "new"),
        ("build", question, text, "-o", "new"),
        ("build", "/no/such/model", text, "-o", question),
        ("ask", question, "book.ctx"),
    )
    assert "Which fluid do I need" in squeeze.refuses(*commands[place])
