"""Tuning a time grid: the best path, what is kept and where it is used."""

import itertools
import json
import shutil

import numpy as np
import pytest

from sedd_jax import runs
from sedd_jax.cli import main as cli
from sedd_jax.evaluation import tune_grid
from sedd_jax.reverse import time_grids


def test_the_best_path_is_the_best_of_all():
    generator = np.random.default_rng(0)
    for num_steps in (1, 2, 4):
        losses = np.where(np.triu(np.ones((7, 7)), 1) > 0, generator.random((7, 7)), np.inf)
        cost = lambda path: sum(losses[a, b] for a, b in itertools.pairwise(path))  # noqa: B023
        paths = [(0, *inner, 6) for inner in itertools.combinations(range(1, 6), num_steps - 1)]
        found = tune_grid.best_path(losses, num_steps)
        assert tuple(found) in paths
        assert cost(found) == pytest.approx(min(map(cost, paths)))


@pytest.mark.parametrize("batch_size", [1, 4, 10, 32])
def test_every_sequence_counts_once_in_a_loss(batch_size):
    loss_fn = lambda key, x0, t, ends: np.tile(x0.mean(1), (len(ends), 1))
    sequences, ends = np.repeat(np.arange(10)[:, None], 3, axis=1).astype(np.int32), np.array([0.5, 0.1])
    found = tune_grid._losses(loss_fn, 4, sequences, 1.0, ends, batch_size=batch_size, seed=0)
    np.testing.assert_allclose(found, [4.5, 4.5])


@pytest.fixture(scope="module")
def tuned(code_run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("tuned") / "run"
    shutil.copytree(code_run, workdir)
    return workdir, tune_grid.tune(workdir, num_steps=4, num_sequences=16, batch_size=8)


def test_a_tuned_grid_loses_no_more_than_others_and_is_kept(tuned):
    workdir, result = tuned
    times = np.array(result["times"])
    assert len(times) == 5
    assert (np.diff(times) < 0).all()
    assert result["bounds"]["tuned"] <= min(result["bounds"].values()) * 1.02
    assert np.isfinite(result["bound_of_all"])
    assert json.loads((workdir / "time_grid.json").read_text())["times"] == result["times"]
    spec = runs.load(workdir).tuned_grid()
    np.testing.assert_allclose(time_grids.parse(spec), times, atol=1e-6)
    shown = str(tune_grid.table(result))
    assert "lost to few steps" in shown
    assert f"{result['bounds']['tuned']:.4f}" in shown


@pytest.mark.slow
def test_samples_are_drawn_on_the_tuned_grid(tuned, capsys):
    workdir, _ = tuned
    run = runs.load(workdir)
    assert run.sampling(grid="tuned").grid == run.tuned_grid()
    flags = [f"--workdir={workdir}", "--num_processes=1", "--num_steps=4", "--grid=tuned", "--corrector_steps=2"]
    assert cli.main(["sample", *flags, "--num_samples=8", "--json"]) == 0
    samples = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {(one["grid"], one["corrector_steps"], one["nfe"]) for one in samples} == {(run.tuned_grid(), 2, 13)}


def test_what_cannot_be_tuned_is_said(code_run, judge_run, capsys):
    with pytest.raises(ValueError, match=r"has no tuned grid: `sedd tune-grid --workdir="):
        runs.load(code_run).sampling(grid="tuned")
    with pytest.raises(ValueError, match=r"is autoregressive: it takes its steps token by token"):
        tune_grid.tune(judge_run)
    with pytest.raises(ValueError, match=r"num_steps=0 must be at least 1"):
        tune_grid.tune(code_run, num_steps=0)
    with pytest.raises(ValueError, match=r"num_steps=100000 must be at most 1024"):
        tune_grid.tune(code_run, num_steps=100_000)
    with pytest.raises(ValueError, match=r"num_sequences=1 must be at least 2"):
        tune_grid.tune(code_run, num_sequences=1)
    assert cli.main(["tune-grid", "--num_steps=4"]) == 2
    assert "--workdir=DIR must be given" in capsys.readouterr().err
