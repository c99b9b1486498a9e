"""Frontiers have a point for every temperature and nucleus of every run, and go on after a stop."""

import json
import shutil

import numpy as np
import pytest

from sedd_jax import runs
from sedd_jax.cli import main as cli
from sedd_jax.evaluation import frontiers, generation_quality, judges, report
from sedd_jax.runtime import errors

SAMPLES = generation_quality.Samples(num_samples=4, batch_size=4)


@pytest.fixture
def run(code_run, tmp_path):
    """A copy of the run without evaluations."""
    shutil.copytree(code_run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluations"))
    return tmp_path / "run"


def test_settings_vary_one_at_a_time_and_the_plain_point_is_always_there():
    points = frontiers.parse("temperature:0.5,1,1.2/top_p:0.9").points()
    assert [(point["temperature"], point["top_p"]) for point in points] == [(0.5, 1), (1.2, 1), (1, 0.9), (1, 1)]
    assert frontiers.parse("top_p:0.5").points()[-1] == {"temperature": 1.0, "top_p": 1.0}


@pytest.mark.parametrize("text", ["0.5", "temperature:", "temperature:warm", "top_k:4", "temperature:0.5;top_p:1"])
def test_what_is_no_frontier_is_refused(text):
    with pytest.raises(errors.UserError, match=f"frontier={text} is no list .*: give one such as temperature:0.7"):
        frontiers.parse(text)


def test_settings_that_no_sampler_takes_are_refused_before_anything_is_drawn(run, judge_run, monkeypatch):
    monkeypatch.setattr(generation_quality, "held_out", None)
    for text in ("top_p:0.5,1.5", "temperature:0"):
        with pytest.raises(errors.UserError, match=text.split(":")[0]):
            frontiers.measure(run, str(judge_run), frontiers.parse(text), samples=SAMPLES)


class Even(judges.Judge):
    """Every token has the probability 1/8."""

    name, length, first = "even", 4, 0

    def _shares(self, run, token):
        return True

    _encode = _features = _log_likelihood = None

    def log_likelihoods(self, samples):
        return [np.full(len(part), -np.log(8.0)) for (part,) in samples]


def test_the_divergence_is_cross_entropy_minus_entropy_with_the_error_of_the_difference(code_run):
    tokens = np.array([[0, 1, 2, 3], [0, 0, 1, 1], [5, 5, 5, 5]])
    found = generation_quality.read(runs.load(code_run), Even(), tokens)
    entropies = np.log([4, 2, 1])
    assert found["cross_entropy"] == pytest.approx(np.log(8))
    assert found["cross_entropy_stderr"] == pytest.approx(0, abs=1e-12)
    assert found["divergence"] == pytest.approx(np.log(8) - entropies.mean())
    assert found["divergence_stderr"] == pytest.approx(entropies.std(ddof=1) / 3**0.5)


@pytest.mark.parametrize("changed", [{"temperature": 0.7}, {"draw": "published"}], ids=str)
def test_a_point_has_its_own_settings_whatever_the_config_says(run, monkeypatch, changed):
    config = runs.read_json(run / "config.json")
    runs.write_json(run / "config.json", config | {"sampling": config["sampling"] | changed})
    drawn = []

    def draw(opened, sampling, num_samples, seed):
        drawn.append((sampling.temperature, sampling.top_p, sampling.draw))
        return np.zeros((num_samples, 32), np.int32)

    monkeypatch.setattr(generation_quality, "draw", draw)
    monkeypatch.setattr(judges, "open_judge", lambda _: Even())
    frontiers.measure(run, "even", frontiers.parse("temperature:0.5/top_p:0.9"), samples=SAMPLES)
    assert drawn == [(0.5, 1, "precise"), (1, 0.9, "precise"), (1, 1, "precise")]


@pytest.mark.slow
def test_two_runs_on_one_picture_point_for_point_as_measured_alone(run, judge_run, tmp_path, monkeypatch, capsys):
    shutil.copytree(run, tmp_path / "other")
    arguments = ["--frontier=temperature:0.5/top_p:0.6", "--num_steps=3", "--num_samples=4", "--batch_size=4"]
    command = ["eval", f"--workdir={run}", f"--judge={judge_run}", *arguments, "--num_processes=1", "--json"]
    assert cli.main(command) == 0
    *printed, last = capsys.readouterr().out.splitlines()
    (alone,) = json.loads(last)["runs"]
    assert [(point["temperature"], point["top_p"]) for point in alone["points"]] == [(0.5, 1), (1, 0.6), (1, 1)]
    single = generation_quality.measure(run, str(judge_run), samples=SAMPLES, num_steps=3, temperature=0.5)
    assert {name: alone["points"][0][name] for name in single["samples"]} == single["samples"]
    assert alone["held_out"] == single["held_out"]
    assert sum(line.startswith(str(run)) for line in printed) == 4
    # What is done is not drawn again, and the other run adds its points.
    drawn, draw = [], generation_quality.draw
    record = lambda opened, *args, **rest: [drawn.append(opened.run.workdir), draw(opened, *args, **rest)][1]
    monkeypatch.setattr(generation_quality, "draw", record)
    assert cli.main([*command, f"--beside={tmp_path}/other"]) == 0
    both = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert drawn == [tmp_path / "other"] * 3
    assert both["runs"][0] == alone
    assert both["runs"][1]["points"] == alone["points"]
    assert (run / "evaluations" / both["picture"]).read_bytes().startswith(b"\x89PNG")
    assert "Quality against entropy" in report.write(run).read_text()
