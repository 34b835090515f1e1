"""Cases of a test of which only some are tried by default."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def thinned(cases: Iterable[Any], every: int = 3, *, several: bool = False) -> list[Any]:
    """The cases for `parametrize`: every n-th is tried by default, the others are slow tests.

    Args:
        several: each case is a tuple with a value for each of several names.
    """
    return [
        case if i % every == 0 else pytest.param(*(case if several else [case]), marks=pytest.mark.slow)
        for i, case in enumerate(cases)
    ]
