"""Results are right or wrong as EvalPlus's harness says."""

import math

import numpy as np
import pytest

from sedd_jax.programs import compare_answers

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("result", "expected", "atol", "is_right"),
    [
        (1, 1, 0, True),
        (1.0, 1, 0, True),
        (True, 1, 0, True),
        (1, 2, 0, False),
        (0.1 + 0.2, 0.3, 1e-6, True),
        (0.1 + 0.2, 0.3, 0, False),
        (1.0 + 1e-5, 1.0, 1e-6, False),
        (1.0 + 1e-5, 1.0, 1e-4, True),
        (1e9 + 50, 1e9, 1e-6, True),
        (1e9 + 200, 1e9, 1e-6, False),
        (2, 2.0000001, 1e-6, False),
        ([1.0, 2.0], [1.0, 2.0 + 1e-8], 1e-6, True),
        ((1.0, 2.0), [1.0, 2.0 + 1e-8], 1e-6, False),
        ([1.0], [1.0, 1.0 + 1e-8], 1e-6, False),
        ([1.0 + 1e-8], [1.0, 1.0], 1e-6, False),
        ([[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0], [3.0, 4.0 + 1e-8]], 1e-6, True),
        (NAN, NAN, 1e-6, True),
        (0.0, NAN, 1e-6, False),
        ([NAN, 1.0], [NAN, 1.0 + 1e-8], 1e-6, True),
        (INF, INF, 0, True),
        (-INF, INF, 1e-6, False),
        (1e308, INF, 1e-6, False),
        ({1, 2}, {2, 1}, 0, True),
        ([1, 2], {1, 2}, 0, False),
        (((1, (2,)),), ((1, (2,)),), 0, True),
        (((1, [2]),), ((1, (2,)),), 0, False),
        ({"a": 1}, {"a": 1}, 0, True),
        (None, None, 0, True),
        (None, 0, 0, False),
        (np.array([1.0, 2.0]), np.array([1.0, 2.0 + 1e-9]), 1e-6, True),
        (np.array([1.0, 2.0]), np.array([1.0, 2.0]), 0, True),
        (np.array([1.0, 2.0]), np.array([1.0, 3.0]), 0, False),
        (np.array([1.0]), [1.0, 2.0], 0, False),
    ],
)
def test_results_are_compared_with_tolerance(result, expected, atol, is_right):
    assert compare_answers.is_right("", result, expected, [], atol=float(atol)) is is_right


@pytest.mark.parametrize(
    ("rule", "result", "expected", "arguments", "is_right"),
    [
        ("find_zero", -0.5, None, [[1, 2]], True),
        ("find_zero", 0.5, None, [[1, 2]], False),
        ("find_zero", 1.0, 2.0, [[2, -3, 1]], True),
        ("similar_elements", [1, 2, 2], (2, 1), [], True),
        ("similar_elements", [1], (2, 1), [], False),
        ("check_str", "a match", True, [], True),
        ("check_str", None, False, [], True),
        ("check_str", None, True, [], False),
        ("check_str", False, True, [], False),
        ("are_equivalent", 5, True, [], True),
        ("sum_div", 0, 7, [8], True),
        ("sum_div", 1, 7, [8], False),
        ("surface_Area", 33, 34, [3, 4], False),
        ("surface_Area", 35, 34, [3, 4], True),
        ("digit_distance_nums", 4, 1, [1, 23], True),
        ("digit_distance_nums", 3, 1, [1, 23], False),
    ],
)
def test_functions_with_several_right_results_have_rules_of_their_own(rule, result, expected, arguments, is_right):
    assert compare_answers.is_right(rule, result, expected, arguments, atol=1e-4) is is_right


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.0, True),
        (1, False),
        ([1.0, 2.0], True),
        ((1.0,), True),
        ([1.0, 2], False),
        ([], False),
        ([[1.0]], False),
        (np.zeros(2), True),
        (np.zeros(2, int), False),
    ],
)
def test_floats_have_a_tolerance_where_the_problem_has_none(value, expected):
    assert compare_answers.are_floats(value) is expected
