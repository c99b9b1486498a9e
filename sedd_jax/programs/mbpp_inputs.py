"""Inputs of MBPP+ in EvalPlus's own layout, where JSON has lists for tuples and sets, and text for complex numbers."""

from collections.abc import Callable
from typing import Any

Arguments = list[Any]


def _tuples(items: Any) -> list[Any]:
    return [tuple(item) for item in items]


def _all_tuples(value: Any) -> Any:
    return tuple(map(_all_tuples, value)) if isinstance(value, list) else value


# What makes the arguments of a function from those in JSON, and the tasks whose functions take such arguments.
_RESTORED: list[tuple[str, Callable[[Arguments], Any]]] = [
    (
        "2 116 132 143 222 261 273 394 399 421 424 429 470 560 579 596 616 630 726 740 744 809",
        _tuples,
    ),
    ("63 64 70 94 120 237 272 299 400 409 417 438 473 614 780", lambda given: [_tuples(one) for one in given]),
    ("75 413 444 753", lambda given: [_tuples(given[0]), given[1]]),
    ("106 750", lambda given: [given[0], tuple(given[1])]),
    ("115", lambda given: [[set(item) if isinstance(item, list) and item else {} for item in given[0]]]),
    ("124", lambda given: [float(given[0]), complex(given[1])]),
    ("250 405 446 617 720 763 808", lambda given: [tuple(given[0]), given[1]]),
    ("252", lambda given: [complex(given[0])]),
    ("259 401 445", lambda given: [tuple(_tuples(one)) for one in given]),
    ("278", lambda given: [tuple(tuple(item) if isinstance(item, list) else item for item in given[0])]),
    ("307", lambda given: [tuple(given[0]), given[1], given[2]]),
    ("580 615 791", lambda given: list(map(_all_tuples, given))),
    ("722", lambda given: [{name: tuple(value) for name, value in given[0].items()}, *given[1:]]),
]
_BY_TASK = {f"Mbpp/{number}": restore for numbers, restore in _RESTORED for number in numbers.split()}


def restored(task_id: str, inputs: list[Arguments]) -> list[Arguments]:
    """The inputs of a task as its function takes them.

    Raises:
        ValueError, TypeError, LookupError, AttributeError: where they are not those of this task.
    """
    restore = _BY_TASK.get(task_id)
    return inputs if restore is None else [restore(arguments) for arguments in inputs]
