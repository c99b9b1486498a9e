"""pass@k counts attempts that pass their problem's tests; what is given of a program is kept."""

import gzip
import itertools
import json
import platform
import re
import sys

import numpy as np
import pytest

from sedd_jax import runs
from sedd_jax.cli import main as cli
from sedd_jax.evaluation import code_problems, generation_quality
from sedd_jax.programs import layouts, sandbox
from sedd_jax.runtime import errors

CHECK = "def check(a):\n    assert (a, b) == (1, 22)"
PREFIX = {"task_id": "t/0", "prompt": "a = 1\nb", "canonical_solution": " = 22\n", "test": CHECK, "entry_point": "a"}
INFILL = {**PREFIX, "task_id": "t/1", "prompt": "a =", "canonical_solution": " 1\nb", "suffix": " = 22\n"}
LONG = {**PREFIX, "task_id": "t/2", "prompt": "a = 1\n" * 6 + "b"}
FOREIGN = {**PREFIX, "task_id": "t/3", "prompt": "# Z\na = 1\nb"}


pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in sandbox._ALLOWED, reason="programs are run on Linux only"
)


@pytest.fixture
def problems(tmp_path):
    """Two that the model has the length and the vocabulary for, and two that it has not."""
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in (PREFIX, INFILL, LONG, FOREIGN)))
    return str(path)


def read(tmp_path, *contents):
    path = tmp_path / "read.jsonl"
    path.write_text("".join(json.dumps(content) + "\n" for content in contents))
    return layouts.read(path)


@pytest.mark.parametrize(("passed", "k"), list(itertools.product(range(6), (1, 2, 5))))
def test_pass_at_k_is_the_share_of_draws_with_one_that_passes(passed, k):
    attempts = [True] * passed + [False] * (5 - passed)
    draws = [any(draw) for draw in itertools.combinations(attempts, k)]
    assert code_problems.pass_at_k(5, passed, k) == pytest.approx(np.mean(draws))


def test_attempts_that_pass_are_counted(code_run, problems, monkeypatch):
    run = runs.load(code_run)
    seen = {}

    def written(opened, sampling, tokens, is_given, seed):
        """The solution in the first attempts at each problem, then another statement."""
        seen["texts"] = ["".join(run.tokenizer.decode(row[known])) for row, known in zip(tokens, is_given, strict=True)]
        found = tokens.copy()
        code = run.tokenizer.encode(" = 22\na = 2\n")
        found[:4, 7 : 7 + 6] = code[:6]
        found[:3, 13:] = run.tokenizer.encode("\n")[0]
        found[3, 13 : 13 + 6] = code[6:]  # Another a, so the attempt fails.
        found[4:10, 7:] = run.tokenizer.encode("=")[0]
        found[10:11, 3:7] = run.tokenizer.encode(" 1\nb")
        found[11:, 3:7] = run.tokenizer.encode(" 22\n")
        return found

    monkeypatch.setattr(generation_quality, "fill", written)
    result = code_problems.measure(code_run, problems, timeout_s=20.0)
    assert result["num_samples"] == 10
    assert seen["texts"] == ["a = 1\nb"] * 10 + ["a = = 22\n"] * 10
    assert result["passed"] == {"t/0": 3, "t/1": 1}
    assert result["outcomes"] == {"passed": 4, "failed": 16}
    assert result["pass_at_1"] == pytest.approx((0.3 + 0.1) / 4)
    assert result["pass_at_10"] == pytest.approx(2 / 4)
    assert "pass_at_100" not in result
    assert set(result["left_out"]) == {"t/2", "t/3"}
    table = str(code_problems.table(result))
    assert "pass@10" in table
    assert "2 problems left out and counted as not passed, such as t/2" in table
    assert run.tokenizer.vocab_size < 20  # so that Z is foreign


def test_inputs_of_evalplus_are_tried_and_the_original_ones_counted_apart(code_run, tmp_path, monkeypatch, capsys):
    """Half of the attempts return what is right for the first input alone."""
    prompt = "def a(b):\n"
    content = {"task_id": "t/9", "prompt": prompt, "canonical_solution": "    return b / 3\n", "entry_point": "a"}
    content |= {"base_input": [[0]], "plus_input": [[1.0], [float("inf")]], "atol": 0, "contract": ""}
    path = tmp_path / "plus.jsonl"
    path.write_text(json.dumps(content))
    (problem,) = layouts.read(path)
    written = [
        (problem, code) for code in ["    return b / 3 + 1e-9\n", "    return b\n", "    return 1\n"] for _ in range(2)
    ]
    monkeypatch.setattr(code_problems, "_template", lambda run, problem: None)
    monkeypatch.setattr(code_problems, "_attempt", lambda *_: written)
    result = code_problems.measure(code_run, str(path), attempts=generation_quality.Samples(num_samples=6))
    assert result["pass_at_1"] == pytest.approx(2 / 6)
    assert result["original_pass_at_1"] == pytest.approx(4 / 6)
    assert (result["passed"], result["original_passed"]) == ({"t/9": 2}, {"t/9": 4})
    assert result["outcomes"] == {"passed": 2, "failed": 4}
    assert result["texts"][0] == prompt + "    return b / 3 + 1e-9\n\n"
    lines = str(code_problems.table(result)).splitlines()
    assert [line.split("  ")[0] for line in lines[2:4]] == ["pass@1", "pass@1, original tests"]


def test_a_function_ends_where_another_statement_begins(code_run, tmp_path):
    run = runs.load(code_run)
    problem, infill = read(tmp_path, PREFIX, INFILL)
    for text, code in (
        ("    return 1\n\ndef f():\n    pass", "    return 1\n"),
        ("    x = 1\nprint(x)", "    x = 1"),
        ("    x\n    if x:\n        print(x)\n", "    x\n    if x:\n        print(x)\n"),
        ("class A: pass", "class A: pass"),
    ):
        assert problem.stop.split(text, maxsplit=1)[0] == code
    template = code_problems._template(run, problem)
    assert (template.is_given.sum(), template.length) == (7, 32)
    between = code_problems._template(run, infill)
    assert between.length == 3 + 4 + 6
    assert np.flatnonzero(~between.is_given[: between.length]).tolist() == [3, 4, 5, 6]


def test_between_a_prompt_and_a_suffix_everything_written_counts(code_run, tmp_path):
    run = runs.load(code_run)
    prefix, infill = read(tmp_path, PREFIX, INFILL)
    for whole, code in ((infill, " 1\nb"), (prefix, " 1")):
        problem = whole._replace(stop=re.compile(r"\nb"))
        template = code_problems._template(run, problem)
        row = template.tokens.copy()
        row[np.flatnonzero(~template.is_given)[:4]] = run.tokenizer.encode(" 1\nb")
        assert code_problems._code(run, problem, row, template) == code


def test_the_command_measures_a_file(code_run, problems, capsys):
    arguments = ["eval", f"--workdir={code_run}", "--suite=humaneval", "--num_processes=1"]
    assert cli.main([*arguments, f"--problems={problems}", "--num_samples=1", "--timeout_s=20", "--json"]) == 0
    *printed, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert "\n".join(printed) == str(code_problems.table(result))
    assert (result["num_problems"], result["num_samples"], result["nfe"]) == (4, 1, 5)
    assert cli.main(arguments) == 2
    assert "--problems=FILE must be given with --suite=humaneval" in capsys.readouterr().err


def test_problems_are_read_as_they_are_distributed(tmp_path):
    """HumanEval.jsonl.gz; a problem may have U+2028 in it."""
    problem = {**PREFIX, "prompt": PREFIX["prompt"] + "# \u2028\n"}
    path = tmp_path / "HumanEval.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps(problem, ensure_ascii=False) + "\n").encode()))
    assert [one.prompt for one in layouts.read(path)] == [problem["prompt"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no problem in it"),
        ("{", ":1: this line is not a problem, nor JSON"),
        ("3", ":1: this line is not a problem with task_id"),
        ("[]", "has no problem in it"),
        (json.dumps(PREFIX) + '\n{"task_id": "t/1"}', ":2: this line is not a problem with task_id"),
        (
            json.dumps({**PREFIX, "test": 1}),
            "with task_id, prompt, canonical_solution, test, entry_point, suffix: test is 1: mend or remove it",
        ),
        (json.dumps({**PREFIX, "canonical_solution": " = 2\n"}), "the solution that t/0 comes with failed: mend"),
    ],
)
def test_wrong_files_are_refused_in_one_line(code_run, tmp_path, capsys, content, message):
    (tmp_path / "problems.jsonl").write_text(content)
    arguments = ["eval", f"--workdir={code_run}", "--suite=humaneval", "--num_processes=1", "--timeout_s=20"]
    assert cli.main([*arguments, f"--problems={tmp_path}/problems.jsonl"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert cli.main([*arguments, f"--problems={tmp_path}/none.jsonl"]) == 1
    assert f"--problems={tmp_path}/none.jsonl is not a file: give one in the format" in capsys.readouterr().err


def test_an_empty_solution_leaves_a_gap_of_one(code_run, tmp_path):
    (problem,) = read(tmp_path, {**INFILL, "canonical_solution": ""})
    run = runs.load(code_run)
    template = code_problems._template(run, problem)
    assert int((~template.is_given[: template.length]).sum()) == 1
    assert len(code_problems._code(run, problem, template.tokens, template)) == 1


def test_two_problems_of_one_name_are_refused(code_run, tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text(f"{json.dumps(PREFIX)}\n{json.dumps(PREFIX)}\n")
    with pytest.raises(errors.UserError, match=r"has 2 problems of the name t/0, whose figures would be mixed: give"):
        code_problems.measure(code_run, str(path))
