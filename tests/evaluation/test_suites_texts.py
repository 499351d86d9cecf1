"""Texts for perplexity and LongPPL: what is cut where, and which tokens count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from suite_options import count_tokens

from squeezed.demo import manual_path
from squeezed.errors import InputError
from squeezed.evaluation.suites.texts import key_tokens, text_pairs
from squeezed.evaluation.suites.windows import windows


def test_pairs_are_consecutive_pieces_of_the_text() -> None:
    text = Path(manual_path()).read_text().strip()
    pairs = text_pairs(Path(manual_path()), 900, 100, 50, 0, count_tokens)
    assert len(pairs) > 5
    at = 0
    for pair in pairs:
        assert 850 < count_tokens(pair.context) <= 900
        assert 60 < count_tokens(pair.continuation) <= 100
        assert pair.continuation[0].isspace()  # cut between words, the space with the word after it
        place = text.index(pair.context + pair.continuation)
        assert place >= at
        at = place + len(pair.context + pair.continuation)


def test_fewer_pairs_are_drawn_from_the_seed_in_the_order_of_the_text() -> None:
    def drawn(seed: int) -> list[str]:
        return [pair.id for pair in text_pairs(Path(manual_path()), 300, 50, 3, seed, count_tokens)]

    assert drawn(0) == drawn(0) == sorted(drawn(0), key=lambda id: int(id.split("-")[-1]))
    assert len(drawn(0)) == 3
    assert drawn(0) != drawn(1)


def test_a_text_shorter_than_one_pair_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 20)
    with pytest.raises(InputError, match="has no text of 150 tokens"):
        text_pairs(tmp_path, 100, 50, 1, 0, count_tokens)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has no text files; expected some that end in \.md"):
        text_pairs(tmp_path / "empty", 100, 50, 1, 0, count_tokens)


def test_key_tokens_are_likely_with_the_long_context_and_much_less_with_the_short() -> None:
    long = torch.tensor([-0.5, -0.5, -1.9, -2.1, -2.0, -0.1])
    short = torch.tensor([-2.6, -2.4, -4.0, -9.0, -9.0, -0.2])
    # differences 2.1, 1.9, 2.1, 6.9, 7.0, 0.1: only those above 2 whose long log p is above -2 count
    assert key_tokens(long, short).tolist() == [True, False, True, False, False, False]


def test_more_windows_hold_those_of_fewer_and_files_of_one_name_have_names_of_their_own(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "README.md").write_text(" ".join(f"{folder}{i}" for i in range(400)))
    few, more = (text_pairs(tmp_path, 20, 5, count, 3, lambda text: len(text.split())) for count in (4, 12))
    assert len({pair.id for pair in more}) == 12
    assert {pair.id for pair in few} < {pair.id for pair in more}


def test_windows_join_short_texts_and_cut_long_ones_between_paragraphs(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {i} of the first text." for i in range(100)]
    (tmp_path / "a.md").write_text("\n\n".join(paragraphs))
    (tmp_path / "b.txt").write_text("A short text.\n\nIts end.")
    (tmp_path / "c.bin").write_bytes(b"\0")
    found = list(windows(tmp_path, 400, count_tokens))
    assert all(360 <= count_tokens(text) <= 400 for _, text in found)
    assert [name for name, _ in found][:2] == ["a-0", "a-1"]
    joined = "\n\n".join(text for _, text in found)
    assert joined.startswith("\n\n".join(paragraphs[:70]))
    whole = list(windows(tmp_path, 4000, count_tokens))
    assert len(whole) == 1  # all there is, though it is short
    assert whole[0][1].endswith("Its end.")


def test_a_paragraph_longer_than_a_window_is_cut_inside(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One sentence follows another. " * 60)
    found = [text for _, text in windows(tmp_path / "a.txt", 100, count_tokens)]
    assert len(found) > 3
    assert all(count_tokens(text) <= 100 for text in found)
    assert all(text.endswith(".") for text in found)
