"""Checks of types that are written where a function is first called; in one process most never are."""

import functools
from collections.abc import Callable
from typing import Any

import beartype


def on_first_call(fn: Callable[..., Any]) -> Callable[..., Any]:
    """beartype's decorator, put off."""
    checked = None

    @functools.wraps(fn)
    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal checked
        if checked is None:
            checked = beartype.beartype(fn)
        return checked(*arguments, **named)

    return call
