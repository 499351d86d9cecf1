"""Which queries vote: at most as many as asked for, evenly spaced over the block."""

from __future__ import annotations

from itertools import pairwise

import pytest

from squeezed.ops.voting import voters, voting


@pytest.mark.parametrize("queries", [1, 2, 3, 7, 64, 255, 256, 300])
@pytest.mark.parametrize("most", [1, 2, 3, 7, 64, 100])
def test_no_more_than_asked_for_vote_and_no_stretch_goes_without(queries: int, most: int) -> None:
    chosen = list(range(queries))[voting(queries, most)]
    assert len(chosen) == voters(queries, most)
    assert 1 <= len(chosen) <= most
    step = -(-queries // most)
    assert {b - a for a, b in pairwise(chosen)} <= {step}
    assert chosen[0] < step
    assert queries - 1 - chosen[-1] < step


def test_all_vote_where_there_are_few_or_nothing_is_said() -> None:
    assert list(range(9))[voting(9, 64)] == list(range(9))
    assert list(range(900))[voting(900, None)] == list(range(900))
    assert voters(1024, 64) == voters(256, 64) == 64
