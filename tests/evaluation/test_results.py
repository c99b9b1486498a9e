"""Results are kept under a name of all that they depend on, with the run's config, and found again."""

import errno
import json
import pathlib
import shutil

import pytest

from sedd_jax import runs
from sedd_jax.cli import main as cli
from sedd_jax.evaluation import results
from sedd_jax.runtime import errors
from tests.support import slow


@pytest.fixture
def run(code_run, tmp_path):
    """A copy of the run without evaluations, opened."""
    shutil.copytree(code_run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluations"))
    return runs.load(tmp_path / "run")


def test_what_is_kept_is_found(run):
    assert results.load(run) == {}
    for seed in (0, 1):
        results.keep(run, results.name("a_kind", {"seed": seed}), {"figure": seed})
    results.keep(run, results.name("other", {}), {"figure": 2})
    results.keep(run, results.name("a_kind", {"seed": 0}), {"figure": 3})
    found = results.load(run)
    assert {kind: [result["figure"] for result in of_kind] for kind, of_kind in found.items()} == {
        "a_kind": [1, 3],
        "other": [2],
    }
    assert found["other"][0]["config"]["data"]["length"] == 32
    assert not list((run.local / "evaluations").glob("*.partial"))


def test_parts_are_read_as_they_were_written(run):
    parts = [{"a": 1.5}, {"a": None}]
    assert results.read_parts(run, "kind-x", ["a"]) == []
    results.write_parts(run, "kind-x", parts)
    assert results.read_parts(run, "kind-x", ["a"]) == parts
    assert results.load(run) == {}


@pytest.mark.parametrize("line", ["[]", "null", "{", "5", "{}", '{"b": 1}', "[" * 100_000])
def test_parts_that_are_damaged_are_named(run, line):
    results.write_parts(run, "kind-x", [{"a": 1.5}])
    with results.path(run, "kind-x.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(errors.UserError, match=r"kind-x.jsonl is damaged .*: remove it and measure again"):
        results.read_parts(run, "kind-x", ["a"])


def test_a_result_comes_with_its_circumstances(run):
    opened = run.restore()
    found = results.circumstances(opened)
    assert (found["step"], found["dtype"], found["workdir"]) == (2, "float32", str(run.workdir))
    assert found["checksum"] == opened.checksum
    assert set(found["versions"]) == {"sedd_jax", "jax", "numpy"}
    json.dumps(found)


BOUND = ["eval", "--num_times=1"]


@pytest.mark.parametrize(
    "command",
    slow.all_but([BOUND], [BOUND, ["tune-grid", "--num_steps=2", "--num_sequences=8", "--batch_size=8"]]),
    ids=lambda command: command[0],
)
def test_a_result_that_cannot_be_kept_is_shown_first(run, monkeypatch, capsys, command):
    """The run of somebody else, or a full disk."""

    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(pathlib.Path, "write_text", refuse)
    monkeypatch.setattr(pathlib.Path, "mkdir", lambda path, **_: None)
    assert cli.main([command[0], f"--workdir={run.workdir}", "--num_processes=1", *command[1:], "--json"]) == 1
    printed = capsys.readouterr()
    *shown, last = printed.out.splitlines()
    assert shown
    assert json.loads(last)["step"] == 2
    assert printed.err.splitlines()[-1].startswith(
        f"sedd {command[0]}: the result is shown, but cannot be kept ({run.workdir}/"
    )
    assert printed.err.endswith("Read-only file system): make the run writable, or copy it\n")


def test_outside_of_a_command_the_system_s_refusal_is_the_error(run):
    (run.local / "evaluations").write_text("in the way")
    with pytest.raises(FileExistsError):
        results.keep(run, "a-1", {})
