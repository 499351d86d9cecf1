"""Suites of questions about long texts, each split into fixed context and user input."""

from squeezed.errors import InputError
from squeezed.evaluation.suites.base import Suite, SuiteOptions, in_turn, token_functions
from squeezed.evaluation.suites.longbench import LONGBENCH
from squeezed.evaluation.suites.prefixqa import PREFIXQA
from squeezed.evaluation.suites.ruler import RULER
from squeezed.evaluation.suites.shared import SHARED

SUITES: dict[str, Suite] = {suite.name: suite for suite in (RULER, LONGBENCH, PREFIXQA, SHARED)}


def find_suite(name: str) -> Suite:
    """The suite of that name.

    Raises:
        InputError: there is none.
    """
    if name not in SUITES:
        raise InputError(f"there is no suite {name}; choose among {', '.join(SUITES)}")
    return SUITES[name]


__all__ = ["SUITES", "Suite", "SuiteOptions", "find_suite", "in_turn", "token_functions"]
