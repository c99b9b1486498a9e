"""Problems are read as HumanEval, HumanEval+, MBPP and MBPP+ are distributed."""

import gzip
import json
import pickle

import pytest

from sedd_jax.programs import layouts, mbpp_inputs
from sedd_jax.runtime import errors
from tests.support import code_tasks

TASK = code_tasks.TASKS[0]
MBPP = {
    "task_id": 2,
    "code": "def f(x):\n  return x\n",
    "test_list": ["assert f(1) == 1", "assert f(2) == 2"],
    "test_setup_code": "y = f(3)",
    "challenge_test_list": [],
}


def read(tmp_path, text):
    path = tmp_path / "problems.jsonl"
    path.write_text(text)
    return layouts.read(path)


def test_inputs_and_a_solution_are_read(tmp_path):
    path = tmp_path / "HumanEvalPlus.jsonl.gz"
    # EvalPlus's file has HumanEval's own test as well.
    path.write_bytes(gzip.compress(json.dumps(code_tasks.evalplus(TASK) | {"test": "def check(f): pass"}).encode()))
    (problem,) = layouts.read(path)
    assert (problem.prompt, problem.solution, problem.tests) == (TASK.prompt, TASK.solution, "")
    answers = problem.answers
    assert (answers.entry_point, answers.atol, answers.num_original, answers.num_inputs) == ("mean_of", 0, 2, 4)
    assert pickle.loads(answers.inputs) == [*TASK.base, *TASK.plus]
    assert problem.stop.split("    return 1\n\ndef g():")[0] == "    return 1\n"


@pytest.mark.parametrize(("name", "rule"), [("HumanEval/32", "mean_of"), ("HumanEval/3", ""), ("Mbpp/3", "mean_of")])
def test_only_the_problems_of_a_collection_have_its_rules(tmp_path, name, rule):
    (problem,) = read(tmp_path, json.dumps(code_tasks.evalplus(TASK) | {"task_id": name}))
    assert problem.answers.rule == rule


@pytest.mark.parametrize(
    ("task_id", "inputs", "expected"),
    [
        ("Mbpp/2", [[[1, 2], [3]]], [[(1, 2), (3,)]]),
        ("Mbpp/63", [[[[1, 2], [3]]]], [[[(1, 2), (3,)]]]),
        ("Mbpp/75", [[[[1]], 2]], [[[(1,)], 2]]),
        ("Mbpp/106", [[[1], [2]]], [[[1], (2,)]]),
        ("Mbpp/115", [[[[1], []]]], [[[{1}, {}]]]),
        ("Mbpp/124", [["1", "2j"]], [[1.0, 2j]]),
        ("Mbpp/250", [[[1], 2]], [[(1,), 2]]),
        ("Mbpp/252", [["(1+2j)"]], [[1 + 2j]]),
        ("Mbpp/259", [[[[1]], [[2]]]], [[((1,),), ((2,),)]]),
        ("Mbpp/278", [[[1, [2]]]], [[(1, (2,))]]),
        ("Mbpp/307", [[[1], 2, 3]], [[(1,), 2, 3]]),
        ("Mbpp/580", [[[1, [2, [3]]]]], [[(1, (2, (3,)))]]),
        ("Mbpp/722", [[{"a": [1]}, 2]], [[{"a": (1,)}, 2]]),
        ("Mbpp/3", [[[1]]], [[[1]]]),
        ("Own/2", [[[1]]], [[[1]]]),
    ],
)
def test_inputs_of_mbpp_plus_have_tuples_and_sets_again(tmp_path, task_id, inputs, expected):
    (problem,) = read(
        tmp_path, json.dumps(code_tasks.evalplus(TASK) | {"task_id": task_id, "base_input": inputs, "plus_input": []})
    )
    found = pickle.loads(problem.answers.inputs)
    assert found == expected
    assert repr(found) == repr(expected)
    assert len(mbpp_inputs._BY_TASK) == sum(len(numbers.split()) for numbers, _ in mbpp_inputs._RESTORED)


def test_mbpp_is_a_task_in_words_and_assertions(tmp_path):
    (problem,) = read(tmp_path, json.dumps(MBPP | {"text": 'Say """it""".'}))
    assert problem.task_id == "Mbpp/2"
    assert problem.prompt == "\"\"\"\nSay '''it'''.\nassert f(1) == 1\n\"\"\"\n"
    assert problem.program(problem.solution) == problem.prompt + MBPP["code"] + "\n"
    assert problem.tests == "y = f(3)\nassert f(1) == 1\nassert f(2) == 2\n"
    assert problem.stop.split("def f():\n  pass\n\ndef g():\n  pass\nassert f()")[0] == (
        "def f():\n  pass\n\ndef g():\n  pass"
    )


def test_sanitized_mbpp_is_one_list(tmp_path):
    entry = {name: value for name, value in MBPP.items() if name not in ("test_setup_code", "challenge_test_list")}
    entry |= {"prompt": "Do.", "test_imports": ["import math"], "source_file": "x"}
    first, second = read(tmp_path, json.dumps([entry, entry | {"task_id": 3}], indent=1))
    assert (first.task_id, second.task_id) == ("Mbpp/2", "Mbpp/3")
    assert first.tests == "import math\nassert f(1) == 1\nassert f(2) == 2\n"


def test_a_test_program_replaces_the_assertions(tmp_path):
    (problem,) = read(tmp_path, json.dumps(MBPP | {"prompt": "Do.", "test_imports": [], "test": "assert f(4) == 4"}))
    assert problem.tests == "assert f(4) == 4\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('["x"]', r", entry 1: this line is not a problem with task_id"),
        (json.dumps(MBPP | {"code": 3}), r":1: this line is not a problem with task_id, code, .*: code is 3"),
        (json.dumps({"test_list": []}), r":1: this line is not a problem with task_id, code, .*: task_id is missing"),
        (json.dumps(code_tasks.evalplus(TASK) | {"atol": "1"}), r"problem with .*base_input.*: atol is '1'"),
        (json.dumps(code_tasks.evalplus(TASK) | {"base_input": [3]}), r"the inputs of Own/mean_of are not those of"),
        (json.dumps(code_tasks.evalplus(TASK) | {"base_input": [], "plus_input": []}), r"the inputs of Own/mean_of"),
        (json.dumps(code_tasks.evalplus(TASK) | {"task_id": "Mbpp/252"}), r"the inputs of Mbpp/252 are not those of"),
    ],
)
def test_what_is_no_problem_is_named(tmp_path, text, message):
    with pytest.raises(errors.UserError, match=message):
        read(tmp_path, text)
