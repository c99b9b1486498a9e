"""A driver of the sandbox: calls a program's function and compares as EvalPlus does. Its source alone is sent there.

Liu et al. 2023, arXiv 2305.01210. Results of the reference solution are what is expected. They stay in the sandbox:
outside they are bytes that are never read.
"""

import copy
import math
import pickle
import struct
import time
from collections.abc import Callable
from typing import Any

import numpy as np

_RELATIVE = 1e-7  # tolerance, beside the absolute one
_OF_FLOATS = 1e-6  # absolute tolerance where a problem has none and floats are expected
# Functions of MBPP+ whose results count as sets, and those of which it counts whether there is a result.
_SETS = {
    "similar_elements",
    "find_char_long",
    "common_in_nested_lists",
    "extract_singly",
    "larg_nnum",
    "intersection_array",
    "find_dissimilar",
    "Diff",
}
_TRUTHS = {"check_str", "text_match_three", "text_starta_endb"}
# (result, arguments, absolute tolerance) -> whether it is right, of functions with several right results.
_ALSO_RIGHT: dict[str, Callable[[Any, list[Any], float], bool]] = {
    "are_equivalent": lambda result, arguments, atol: True,
    "sum_div": lambda result, arguments, atol: result == 0,
    "surface_Area": lambda result, arguments, atol: abs(result - _pyramid(*arguments)) <= atol,
    "digit_distance_nums": lambda result, arguments, atol: result == _digits_apart(*arguments),
}


def drive(program: Callable[[], dict[str, Any]], given: bytes, tell: Callable[[bytes], None]) -> None:
    """Passes where every result is as expected.

    Args:
        program: runs the program and returns its names.
        given: a pickled dict: entry_point, rule, atol, the pickled inputs, and expected, the pickled results. Where
            expected is None, this is the reference solution.
        tell: sends that a part has ended: one when the inputs are read, then one for each of them. The reference has
            one for all of them; then follow the seconds of each, as float64, and the pickled results.
    """
    task = pickle.loads(given)
    rule, atol, inputs = task["rule"], task["atol"], pickle.loads(task["inputs"])
    expected = None if task["expected"] is None else pickle.loads(task["expected"])
    tell(b".")
    function = program()[task["entry_point"]]
    if expected is None:
        found = _results(function, inputs, only_truth=rule in _TRUTHS)
        tell(b".")
        tell(found)
        return
    for arguments, wanted in zip(inputs, expected, strict=True):
        before = copy.deepcopy(arguments) if rule else arguments
        result = function(*arguments)
        # As EvalPlus has it, the tolerance stays for all that follows.
        atol = _OF_FLOATS if atol == 0 and are_floats(wanted) else atol
        assert is_right(rule, result, wanted, before, atol=atol)
        tell(b".")


def is_right(rule: str, result: Any, expected: Any, arguments: list[Any], *, atol: float) -> bool:
    """Whether the result of a function is the expected one, or by the rule of its name another right one.

    Unlike EvalPlus, NaN is right where NaN is expected. There no result would be right, not that of the reference
    either.
    """
    if rule == "find_zero":  # Any zero of the polynomial.
        return abs(sum(factor * math.pow(result, power) for power, factor in enumerate(arguments[0]))) <= atol
    if rule in _SETS:
        return set(result) == set(expected)
    if rule in _TRUTHS:
        return expected == (result if isinstance(result, bool) else result is not None)
    is_same = result == expected
    if isinstance(result, np.ndarray) or isinstance(expected, np.ndarray):
        is_same = np.array_equal(result, expected)
    if is_same or (rule in _ALSO_RIGHT and _ALSO_RIGHT[rule](result, arguments, atol)):
        return True
    if atol == 0 or type(result) is not type(expected):
        return False
    if isinstance(expected, (list, tuple)) and len(result) != len(expected):
        return False
    return bool(np.allclose(result, expected, rtol=_RELATIVE, atol=atol, equal_nan=True))


def _results(function: Callable[..., Any], inputs: list[list[Any]], *, only_truth: bool) -> bytes:
    """The seconds of each input and the pickled results."""
    seconds, results = [], []
    for arguments in inputs:
        start = time.perf_counter()
        result = function(*arguments)
        seconds.append(time.perf_counter() - start)
        results.append(result is not None if only_truth else result)
    return struct.pack(f"<{len(seconds)}d", *seconds) + pickle.dumps(results)


def are_floats(value: Any) -> bool:
    """Whether a value is a float, or a list, tuple or array of floats alone."""
    if isinstance(value, np.ndarray):
        return value.dtype in (np.float64, np.float32)
    return isinstance(value, float) or (
        isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, float) for item in value)
    )


def _pyramid(base: Any, height: Any) -> int:
    """The surface of a square pyramid, where `height` is its height and not the slant height."""
    return round(base**2 + 2 * base * math.hypot(base / 2, height))


def _digits_apart(first: Any, second: Any) -> int:
    """The sum of differences of digits in the same place, the shorter number filled up with zeros."""
    width = max(len(str(first)), len(str(second)))
    return sum(abs(int(a) - int(b)) for a, b in zip(str(first).zfill(width), str(second).zfill(width), strict=True))
