"""Tries programs at problems in the sandbox, in the time that the reference solution gives them."""

import functools
import pathlib
import pickle
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from sedd_jax.programs import compare_answers, layouts, run_tests, sandbox
from sedd_jax.runtime import errors, hosts

# As EvalPlus sets them: an attempt has so many times the reference's time, at each input so many seconds at least, and
# for all inputs of a kind these at most.
_TIMES_REFERENCE = 4.0
_LEAST_OF_INPUT, _MOST_OF_ALL = 4.0, 60.0
_LEAST_OF_TESTS = 3.0  # seconds, as HumanEval sets them
_LARGE_MEMORY = 4 * 2**30  # bytes of address space as EvalPlus sets them, for inputs as large as its
_REFERENCE = 120.0  # seconds for the reference solution
_READING = 30.0  # seconds to read the inputs, or the tests, on a busy machine
_TOLD = 2**30  # bytes of results of the reference solution


class Trial(NamedTuple):
    """A problem, and what it takes to try a program at it."""

    problem: layouts.Problem
    driver: sandbox.Driver
    timeout_s: float


class Attempt(NamedTuple):
    """How an attempt ended, and whether it passed the original tests, without those that HumanEval+ and MBPP+ add."""

    outcome: sandbox.Outcome
    passed_original: bool


def prepare(problem: layouts.Problem, timeout_s: float | None = None) -> Trial:
    """Runs the reference solution, which says how long programs may take and, in EvalPlus's layout, what is expected.

    Args:
        problem: the problem.
        timeout_s: the least seconds an attempt has, at each input where there are inputs; None for 3, or 4.

    Raises:
        errors.UserError: where the reference solution does not pass.
    """
    return (
        _of_tests(problem, timeout_s) if problem.answers is None else _of_answers(problem, problem.answers, timeout_s)
    )


def attempt(trial: Trial, code: str) -> Attempt:
    """Tries code at a problem."""
    ended = sandbox.drive(trial.problem.program(code), trial.driver, timeout_s=trial.timeout_s)
    passed = ended.outcome == sandbox.Outcome.PASSED
    answers = trial.problem.answers
    return Attempt(ended.outcome, passed if answers is None else ended.num_parts > answers.num_original)


def num_at_once(found: Iterable[layouts.Problem]) -> int:
    """How many attempts to run at once: one on each core, and no more than memory holds if all take what they may."""
    return max(1, min(hosts.num_cores(), hosts.memory_bytes() // max(map(_memory, found))))


def _memory(problem: layouts.Problem) -> int:
    """Bytes of address space for a program: more where its tests have NumPy."""
    is_large = problem.answers is not None or "module numpy.random" in sandbox.needs(problem.tests)
    return _LARGE_MEMORY if is_large else sandbox.MEMORY


def _of_tests(problem: layouts.Problem, timeout_s: float | None) -> Trial:
    """A trial by a test program. Compiled once, it is handed to every attempt."""
    driver = sandbox.Driver(
        source=_source(run_tests.__file__),
        given=b"s" + problem.tests.encode("utf-8", "replace"),
        needs=sandbox.needs(problem.tests),
        parts=(_READING, _REFERENCE),
        most=_TOLD,
        memory=_memory(problem),
    )
    told = _told(problem, driver)
    (seconds,) = run_tests.SECONDS.unpack(told[: run_tests.SECONDS.size])
    least = _LEAST_OF_TESTS if timeout_s is None else timeout_s
    parts = (_READING, max(least, _TIMES_REFERENCE * seconds))
    driver = driver._replace(given=b"c" + told[run_tests.SECONDS.size :], parts=parts, most=0)
    return Trial(problem, driver, sum(parts))


def _of_answers(problem: layouts.Problem, answers: layouts.Answers, timeout_s: float | None) -> Trial:
    """A trial by what the function returns for inputs. The reference solution must return the same twice."""
    task = {"entry_point": answers.entry_point, "rule": answers.rule, "atol": answers.atol, "inputs": answers.inputs}
    driver = sandbox.Driver(
        source=_source(compare_answers.__file__),
        given=pickle.dumps(task | {"expected": None}),
        needs=sandbox.needs("numpy"),
        parts=(_READING, _REFERENCE),
        most=_TOLD,
        memory=_memory(problem),
    )
    told = _told(problem, driver)
    size = 8 * answers.num_inputs
    least = _LEAST_OF_INPUT if timeout_s is None else timeout_s
    limits = np.maximum(least, _TIMES_REFERENCE * np.frombuffer(told[:size], "<f8"))
    kinds = np.split(limits, [answers.num_original])
    driver = driver._replace(
        given=pickle.dumps(task | {"expected": told[size:]}), parts=(_READING, *limits.tolist()), most=0
    )
    trial = Trial(problem, driver, _READING + sum(min(_MOST_OF_ALL, float(kind.sum())) + 2.0 for kind in kinds))
    _check(problem, attempt(trial, problem.solution).outcome)
    return trial


def _told(problem: layouts.Problem, driver: sandbox.Driver) -> bytes:
    """What a driver tells of the reference solution.

    Raises:
        errors.UserError: where that does not pass.
    """
    ended = sandbox.drive(problem.program(problem.solution), driver, timeout_s=sum(driver.parts))
    _check(problem, ended.outcome)
    return ended.told


def _check(problem: layouts.Problem, outcome: sandbox.Outcome) -> None:
    if outcome != sandbox.Outcome.PASSED:
        raise errors.UserError(f"the solution that {problem.task_id} comes with {outcome}", remedy="mend or remove it")


@functools.cache
def _source(path: str) -> str:
    return pathlib.Path(path).read_text(encoding="utf-8")
