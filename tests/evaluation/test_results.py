"""Results are kept under a name of all that they depend on, with the run's config, and found again."""

import json
import shutil

import pytest

from sedd_jax import runs
from sedd_jax.evaluation import results


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
    assert results.read_parts(run, "kind-x") == []
    results.write_parts(run, "kind-x", parts)
    assert results.read_parts(run, "kind-x") == parts
    assert results.load(run) == {}


def test_a_result_comes_with_its_circumstances(run):
    found = results.circumstances(run, 7)
    assert (found["step"], found["dtype"], found["workdir"]) == (7, "float32", str(run.workdir))
    assert set(found["versions"]) == {"sedd_jax", "jax", "numpy"}
    json.dumps(found)
