"""Reference solutions of problems pass and wrong ones fail, in every layout, in the time that the reference gives."""

import json
import platform
import sys

import pytest

from sedd_jax.programs import layouts, sandbox, trials
from sedd_jax.runtime import errors
from tests.support import code_tasks, slow

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in sandbox._ALLOWED, reason="programs are run on Linux only"
)

LAYOUTS = {"evalplus": code_tasks.evalplus, "hub": code_tasks.hub}
BY_NAME = {task.name: task for task in code_tasks.TASKS}
QUICK = [("evalplus", "with_gaps"), ("hub", "float_grid"), ("evalplus", "shared")]
# Inputs, results and tests of these are large.
LARGE = [*QUICK, ("hub", "sort_large"), ("evalplus", "sort_large"), ("hub", "mean_of"), ("evalplus", "commonest")]
NEVER_ENDS = "slow_sum"  # what one of its wrong solutions does
LARGE += [("evalplus", NEVER_ENDS)]


def read(tmp_path, *contents):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(content) + "\n" for content in contents))
    return layouts.read(path)


def passes_and_fails(tmp_path, layout, task):
    (problem,) = read(tmp_path, LAYOUTS[layout](task))
    trial = trials.prepare(problem)
    assert trials.attempt(trial, problem.solution) == (sandbox.Outcome.PASSED, True), task.name
    for wrong in task.wrong_solutions:
        assert trials.attempt(trial, wrong).outcome != sandbox.Outcome.PASSED, wrong


@pytest.mark.parametrize(("layout", "name"), slow.all_but(QUICK, LARGE))
def test_the_reference_passes_and_wrong_solutions_do_not(tmp_path, layout, name):
    passes_and_fails(tmp_path, layout, BY_NAME[name])


@pytest.fixture
def in_this_process(monkeypatch):
    """Programs, which are ours, run here under the same drivers, without a process for each."""

    def drive(program, driver, *, timeout_s):
        names, told = {}, []
        exec(compile(driver.source, "driver", "exec"), names)
        try:
            names["drive"](lambda: sandbox._run(program.encode(), {}), driver.given, told.append)
        except BaseException:
            said = sandbox.Ended(sandbox.Outcome.FAILED, 0, b"")
        else:
            said = sandbox.Ended(sandbox.Outcome.PASSED, len(driver.parts), b"".join(told[len(driver.parts) :]))
        return said._replace(num_parts=told.count(sandbox.PART))

    monkeypatch.setattr(sandbox, "drive", drive)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reference_of_each_task_passes_and_wrong_solutions_do_not(in_this_process, tmp_path, layout):
    for task in code_tasks.TASKS:
        if task.name != NEVER_ENDS:
            passes_and_fails(tmp_path, layout, task)


def gives_whole_functions(tmp_path, task):
    (problem,) = read(tmp_path, code_tasks.mbpp(task._replace(base=[*task.base, *task.plus])))
    trial = trials.prepare(problem)
    assert trials.attempt(trial, problem.solution).outcome == sandbox.Outcome.PASSED
    assert trials.attempt(trial, "").outcome == sandbox.Outcome.FAILED


def test_mbpp_gives_whole_functions(tmp_path):
    gives_whole_functions(tmp_path, BY_NAME["error_name"])


@pytest.mark.slow
def test_mbpp_gives_whole_functions_for_each_task(in_this_process, tmp_path):
    for task in code_tasks.TASKS:
        if task.is_plain:
            gives_whole_functions(tmp_path, task)


def test_the_original_tests_are_counted_apart(tmp_path):
    task = BY_NAME["safe_int"]
    (problem,) = read(tmp_path, code_tasks.evalplus(task))
    trial = trials.prepare(problem)
    assert trials.attempt(trial, "    return int(text)\n") == (sandbox.Outcome.FAILED, True)
    assert trials.attempt(trial, "    return 7\n") == (sandbox.Outcome.FAILED, False)
    assert trials.attempt(trial, "    return = 7\n") == (sandbox.Outcome.FAILED, False)


def test_time_is_four_times_the_references_and_at_least_what_is_asked(tmp_path):
    task = code_tasks.Task("f", "f(x)", "time.sleep(x)\nreturn x", (), [[0.0]], [[0.3], [0.0]], before="import time\n")
    answers, tests = read(tmp_path, code_tasks.evalplus(task), code_tasks.hub(task))
    trial = trials.prepare(answers, 0.5)
    reading, *limits = trial.driver.parts
    assert [limits[0], limits[2]] == [0.5, 0.5]
    assert limits[1] == pytest.approx(1.2, rel=0.4)
    assert trial.timeout_s == pytest.approx(reading + (0.5 + 2) + (limits[1] + 0.5 + 2))
    assert trials.prepare(tests, 0.5).driver.parts[1] == pytest.approx(1.2, rel=0.6)


def test_time_without_being_asked_is_that_of_the_collections(tmp_path):
    answers, tests = read(tmp_path, *(layout(BY_NAME["mean_of"]) for layout in LAYOUTS.values()))
    trial = trials.prepare(answers)
    assert trial.driver.parts[1:] == (4.0, 4.0, 4.0, 4.0)
    assert trials.prepare(tests).driver.parts[1:] == (3.0,)
    # However many inputs there are, a minute is all they have.
    assert trials.prepare(answers, 50.0).timeout_s == trial.driver.parts[0] + 2 * (60 + 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_attempt_that_never_ends_is_ended(tmp_path, layout):
    task = BY_NAME["true_or_one"]
    (problem,) = read(tmp_path, LAYOUTS[layout](task))
    trial = trials.prepare(problem, 0.5)
    assert trials.attempt(trial, "    while x <= 0:\n        pass\n    return True\n") == (
        sandbox.Outcome.TIMED_OUT,
        layout == "evalplus",
    )
    assert trials.attempt(trial, "    pass\nwhile True: pass\n").outcome == sandbox.Outcome.TIMED_OUT


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_reference_that_does_not_pass_is_named(tmp_path, layout):
    content = LAYOUTS[layout](BY_NAME["mean_of"])
    (problem,) = read(tmp_path, content | {"canonical_solution": "    return values.mean\n"})
    with pytest.raises(errors.UserError, match=r"the solution that Own/mean_of comes with failed: mend or remove it"):
        trials.prepare(problem)


def test_a_reference_that_returns_something_else_each_time_is_named(tmp_path):
    content = code_tasks.evalplus(BY_NAME["mean_of"])
    content |= {"canonical_solution": "    import random\n    return random.random()\n"}
    with pytest.raises(errors.UserError, match="the solution that Own/mean_of comes with failed"):
        trials.prepare(*read(tmp_path, content))


def test_inputs_are_fresh_for_each_attempt_and_tests_are_compiled_once(tmp_path):
    for layout in LAYOUTS.values():
        task = BY_NAME["in_place"]
        (problem,) = read(tmp_path, layout(task))
        trial = trials.prepare(problem)
        for _ in range(2):
            assert trials.attempt(trial, problem.solution).outcome == sandbox.Outcome.PASSED
    assert trial.driver.given[:1] == b"c"
    assert b"for inp, exp in zip" not in trial.driver.given


@pytest.mark.slow
def test_a_program_may_redefine_what_the_comparison_uses(tmp_path):
    (problem,) = read(tmp_path, code_tasks.evalplus(BY_NAME["mean_of"]))
    code = problem.solution + "\nis_right = are_floats = pickle = zip = None\n"
    assert trials.attempt(trials.prepare(problem), code).outcome == sandbox.Outcome.PASSED
    wrong = "    return 0.0\n\nis_right = lambda *_, **__: True\nclass AssertionError(Exception): pass\n"
    assert trials.attempt(trials.prepare(problem), wrong).outcome == sandbox.Outcome.FAILED


def test_no_more_run_at_once_than_memory_holds(tmp_path, monkeypatch):
    """Problems with NumPy and large inputs may take 4 GiB each, others half of one."""
    monkeypatch.setattr(trials.hosts, "num_cores", lambda: 8)
    plain, *large = read(tmp_path, *(layout(BY_NAME["mean_of"]) for layout in (code_tasks.mbpp, *LAYOUTS.values())))
    for memory, few, many in ((2**30, 1, 2), (9 * 2**30, 2, 8), (2**40, 8, 8)):
        monkeypatch.setattr(trials.hosts, "memory_bytes", lambda memory=memory: memory)
        assert trials.num_at_once([plain]) == many
        for problem in large:
            assert trials.num_at_once([plain, problem]) == few
