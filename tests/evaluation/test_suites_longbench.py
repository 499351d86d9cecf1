"""LongBench from records in its format, made up: every task, its prompt, truncation and metric."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import tiny
from suite_options import DATA, count_tokens, options, samples

from squeezed.errors import InputError
from squeezed.evaluation.metrics import METRICS
from squeezed.evaluation.sample import Sample
from squeezed.evaluation.suites import find_suite, token_functions

RECORDS = DATA / "longbench"
TASKS = find_suite("longbench").tasks
ALL = (*TASKS, "passage_retrieval_en")
LONG = 100_000


def found(*tasks: str, length: int = LONG, **changes: object) -> list[Sample]:
    return samples("longbench", length, count=50, tasks=tasks, **{"data": RECORDS, **changes})


def test_the_tasks_are_those_of_the_papers_table() -> None:
    assert set(TASKS) == {
        *("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique"),
        *("gov_report", "qmsum", "multi_news", "trec", "triviaqa", "samsum", "lcc", "repobench-p"),
    }


@pytest.mark.parametrize("task", ALL)
def test_every_record_becomes_a_sample_that_its_answer_solves(task: str) -> None:
    records = [json.loads(line) for line in (RECORDS / f"{task}.jsonl").read_text().splitlines()]
    for sample, record in zip(found(task), records, strict=True):
        assert record["context"] in sample.context
        assert record["input"] in sample.question
        assert record["input"] == "" or record["input"] not in sample.context
        assert METRICS[sample.metric](sample.answers[-1], sample) == pytest.approx(1)
        assert METRICS[sample.metric]("zzz", sample) < 0.3
        assert sample.choices == tuple(record["all_classes"] or ())


@pytest.mark.parametrize(
    ("task", "metric", "tokens"),
    [
        ("narrativeqa", "qa_f1", 128),
        ("hotpotqa", "qa_f1", 32),
        ("multifieldqa_en", "qa_f1", 64),
        ("gov_report", "rouge_l", 512),
        ("samsum", "rouge_l_first_line", 128),
        ("triviaqa", "qa_f1_first_line", 32),
        ("trec", "classification_first_line", 64),
        ("lcc", "code_similarity", 64),
        ("passage_retrieval_en", "retrieval", 32),
    ],
)
def test_metrics_and_longest_answers_are_the_published_ones(task: str, metric: str, tokens: int) -> None:
    sample = found(task)[0]
    assert (sample.metric, sample.max_new_tokens) == (metric, tokens)


def test_the_split_is_before_the_question() -> None:
    sample = found("multifieldqa_en")[0]
    assert sample.context.startswith("Read the following text and answer briefly.\n\nThe tenant shall keep")
    assert sample.context.endswith("only give me the answer and do not output any other words.")
    assert sample.question == "Question: How many donkeys may the tenant keep?\nAnswer:"
    code = found("repobench-p")[0]
    assert code.context.startswith("Please complete the code given below. \n# Path: shapes/point.py")
    assert code.question.startswith("# Path: shapes/line.py")
    assert code.question.endswith("Next line of code:\n")


def test_questions_on_one_context_come_one_after_another() -> None:
    first, second = found("qasper")
    assert first.context == second.context
    assert first.question != second.question


def test_long_contexts_lose_their_middle_only() -> None:
    whole = found("gov_report")[0].context
    cut = found("gov_report", length=60)[0].context
    assert count_tokens(cut) <= 60 < count_tokens(whole)
    assert whole.startswith(cut[:50])
    assert whole.endswith(cut[-50:])


def test_a_long_question_takes_its_room_from_the_context() -> None:
    sample = found("repobench-p", length=90, question_room=20)[0]
    assert count_tokens(sample.context) + count_tokens(sample.question) <= 90 + 20
    assert sample.question.endswith("Next line of code:\n")


def test_fewer_samples_are_drawn_from_the_seed() -> None:
    ids = {
        tuple(sample.id for sample in samples("longbench", LONG, count=1, seed=seed, tasks=("qasper",), data=RECORDS))
        for seed in range(8)
    }
    assert len(ids) == 2
    assert all(len(chosen) == 1 for chosen in ids)


def archive(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "data.zip", "w") as zipped:
        for file in RECORDS.glob("*.jsonl"):
            zipped.write(file, f"data/{file.name}")
    return folder / "data.zip"


def test_the_hubs_archive_reads_like_the_folder(tmp_path: Path) -> None:
    assert found(*ALL, data=archive(tmp_path)) == found(*ALL)


def test_without_a_folder_the_hub_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, file: str, repo_type: str) -> str:
        asked.append((repository, file, repo_type))
        return str(archive(tmp_path))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert found("lcc", data=None) == found("lcc")
    assert asked == [("THUDM/LongBench", "data.zip", "dataset")]


def test_an_unreachable_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(InputError, match=r"can't be fetched from the hub \(ConnectionError\); fetch data\.zip"):
        found("lcc", data=None)


def test_bad_data_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"lcc\.jsonl does not exist; expected LongBench's jsonl files"):
        found("lcc", data=tmp_path)
    (tmp_path / "lcc.jsonl").write_text('{"input": "x"}\n')
    with pytest.raises(InputError, match="a record of lcc is not in LongBench's format"):
        found("lcc", data=tmp_path)
    (tmp_path / "lcc.jsonl").write_text("nonsense\n")
    with pytest.raises(InputError, match=r"lcc\.jsonl:1 is not JSON"):
        found("lcc", data=tmp_path)
    shutil.copy(RECORDS / "lcc.jsonl", tmp_path / "data.zip")
    with pytest.raises(InputError, match="can't be read"):
        found("lcc", data=tmp_path / "data.zip")


def test_truncation_by_a_real_tokenizer_keeps_both_ends() -> None:
    count, truncate = token_functions(tiny.tokenizer())
    text = "the man. " * 40 + "\n\n" + "then why?! " * 40
    for tokens in (1, 2, 3, 50, 51, 400):
        cut = truncate(text, tokens)
        assert count(cut) <= tokens
        assert count(cut) >= min(count(text), tokens) - 2
        kept = next(n for n in range(len(cut), -1, -1) if text.startswith(cut[:n]))
        assert text.endswith(cut[kept:])
        assert abs(count(cut[:kept]) - count(cut[kept:])) <= 3
    assert truncate(text, 10_000) == text
    assert options(5).count == 3
