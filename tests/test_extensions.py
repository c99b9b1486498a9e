"""A sampler and a graph that are added from one file each train, sample and are measured by the commands themselves."""

import ast
import json

import pytest

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.cli import main as cli
from sedd_jax.diffusion import graphs
from sedd_jax.reverse import samplers
from tests.support import places, toy_graph, toy_sampler


@pytest.fixture
def extended(monkeypatch):
    monkeypatch.setitem(samplers.SAMPLERS, "toy", toy_sampler.SAMPLER)
    monkeypatch.setitem(graphs.GRAPHS, "toy", toy_graph.TwiceUniform)


@pytest.fixture
def toy_run(extended, code_run, tmp_path):
    """A run of two steps with the graph of the test."""
    settings = configs.flatten(configs.to_dict(runs.load(code_run).config))
    settings |= {"graph.name": "toy", "network.scale_by_sigma": False, "sampling.sampler": "toy"}
    workdir = tmp_path / "run"
    arguments = [f"--config.{name}={value}" for name, value in settings.items()]
    assert cli.main(["train", f"--workdir={workdir}", "--num_processes=1", *arguments]) == 0
    return workdir


def _samples(capsys, workdir, *flags):
    capsys.readouterr()
    status = cli.main(["sample", f"--workdir={workdir}", "--num_processes=1", "--num_samples=8", "--json", *flags])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    return json.loads(printed.out.splitlines()[-1])


@pytest.mark.slow
def test_a_run_trains_samples_and_is_evaluated_with_both(toy_run, capsys):
    found = _samples(capsys, toy_run, "--num_steps=3")
    assert {(one["sampler"], one["num_steps"], one["nfe"]) for one in found} == {("toy", 3, 7)}
    assert len({one["text"] for one in found}) > 1
    assert cli.main(["eval", f"--workdir={toy_run}", "--num_processes=1", "--num_times=1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["score_entropy"]["nats_per_token"] > 0
    assert "cross_entropy" not in result
    tune = ["tune-grid", f"--workdir={toy_run}", "--num_processes=1", "--num_steps=2", "--num_sequences=8"]
    assert cli.main([*tune, "--batch_size=8"]) == 0
    assert len(_samples(capsys, toy_run, "--num_steps=2", "--grid=tuned")) == 8


@pytest.mark.slow
def test_a_sampler_takes_grids_corrector_steps_guidance_and_prompts(extended, code_run, capsys):
    more = ["--grid=cosine", "--corrector_steps=1", "--guidance=2", "--template=a = {5}"]
    found = _samples(capsys, code_run, "--sampler=toy", "--num_steps=2", *more)
    # Two evaluations, with and without what is given, twice for the corrector, two steps, and the last one.
    assert {one["nfe"] for one in found} == {2 * 2 * 2 * 2 + 2}
    assert all(one["text"].startswith("a = ") for one in found)
    refilled = _samples(capsys, code_run, "--sampler=toy", "--num_steps=2", "--template=a = {5}", "--fit")
    assert all(len(one["tokens"]) == 9 for one in refilled)


def test_help_validation_and_the_page_know_them(extended, code_run, capsys):
    assert cli.main(["sample", "--help"]) == 0
    assert "toy (two halves of a step)" in capsys.readouterr().out
    assert cli.main(["train", "--help"]) == 0
    assert "toy (tokens turn into any token at twice the rate)" in capsys.readouterr().out
    assert cli.main(["sample", f"--workdir={code_run}", "--num_processes=1", "--sampler=none"]) == 1
    assert ", toy" in capsys.readouterr().err


def test_a_grid_is_refused_where_a_sampler_has_no_steps_in_time():
    """Every sampler's traits are true: those that take a grid have the field, the others refuse it."""
    for sampler, made in samplers.SAMPLERS.items():
        assert hasattr(made, "grid") == made.traits.takes_grid
        sampling = configs.SamplingConfig(sampler=sampler, grid="cosine")
        if made.traits.takes_grid:
            configs.validate(configs.Config(sampling=sampling))
        else:
            with pytest.raises(ValueError, match=f"cosine has no meaning for {sampler}"):
                configs.validate(configs.Config(sampling=sampling))


def test_nothing_but_the_tables_knows_a_sampler_or_a_graph_by_name():
    # "uniform" is a time grid, too; and configs of other programs have their own names for graphs.
    allowed = {
        ("reverse/time_grids.py", "uniform"),
        ("conversion/torch_model.py", "absorb"),
        ("conversion/other_programs.py", "uniform"),
    }
    names = {*samplers.SAMPLERS, *graphs.GRAPHS}
    found = set()
    for path in places.PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare | ast.Match):
                words = {one.value for one in ast.walk(node) if isinstance(one, ast.Constant)} & names
                found |= {(path.relative_to(places.PACKAGE).as_posix(), word) for word in words}
    assert found <= allowed
