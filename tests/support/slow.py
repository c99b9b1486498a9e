"""Cases of a parametrised test that `make test` leaves out; see the marker "slow" in pyproject.toml."""

from collections.abc import Iterable
from typing import Any

import pytest


def all_but(quick: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases, of which all but the `quick` ones are slow."""
    quick = list(quick)
    return [case if case in quick else _slow(case) for case in cases]


def _slow(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
