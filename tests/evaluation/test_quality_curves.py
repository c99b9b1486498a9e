"""Curves have a point for every sampler, draw and number of steps, and go on after a stop."""

import csv
import dataclasses
import json
import shutil

import pytest

from sedd_jax import runs
from sedd_jax.cli import main as cli
from sedd_jax.evaluation import generation_quality, judges, quality_curves
from sedd_jax.model import sampling_config
from sedd_jax.runtime import errors

SAMPLES = generation_quality.Samples(num_samples=4, batch_size=4)

ARGUMENTS = [
    "--curve=steps:2,4",
    "--samplers=tweedie,tau_leaping",
    "--num_samples=4",
    "--batch_size=4",
    "--num_processes=1",
]


@pytest.fixture
def run(code_run, tmp_path):
    """A copy of the run without evaluations."""
    shutil.copytree(code_run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluations"))
    return tmp_path / "run"


@pytest.mark.slow
def test_points_are_those_of_single_measurements(run, judge_run, capsys):
    assert cli.main(["eval", f"--workdir={run}", f"--judge={judge_run}", *ARGUMENTS, "--json"]) == 0
    *printed, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    wanted = [
        (sampler, draw, steps)
        for sampler in ("tweedie", "tau_leaping")
        for draw in ("precise", "published")
        for steps in (2, 4)
    ]
    assert [(point["sampler"], point["draw"], point["num_steps"]) for point in result["points"]] == wanted
    point = result["points"][6]
    single = generation_quality.measure(
        run, str(judge_run), samples=SAMPLES, sampler="tau_leaping", draw="published", num_steps=2
    )
    assert {name: point[name] for name in single["samples"]} == single["samples"]
    assert point["nfe"] == single["nfe"] == 3
    assert result["held_out"] == single["held_out"]
    own = generation_quality.measure(judge_run, str(judge_run), samples=SAMPLES)
    settings = sampling_config.refinements(runs.load(judge_run).sampling())
    assert result["judge_samples"] == {"nfe": 32} | settings | own["samples"]
    assert "\n".join(printed) == str(quality_curves.table(result))
    picture = run / "evaluations" / result["picture"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    with picture.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["unigram_entropy"]) for row in rows] == [found["unigram_entropy"] for found in result["points"]]
    assert json.loads(picture.with_suffix(".json").read_text())["config"]["data"]["length"] == 32


@pytest.mark.slow
def test_points_that_are_done_are_not_drawn_again(run, judge_run, monkeypatch):
    curve = lambda *num_steps: quality_curves.Curve(samplers=["tweedie"], num_steps=num_steps)
    first = quality_curves.measure(run, str(judge_run), curve(2), samples=SAMPLES)
    drawn = []
    draw = generation_quality.draw
    monkeypatch.setattr(
        generation_quality,
        "draw",
        lambda opened, *args, **rest: [drawn.append(opened.run.is_autoregressive), draw(opened, *args, **rest)][1],
    )
    both = quality_curves.measure(run, str(judge_run), curve(4, 2), samples=SAMPLES)
    # The judge's own samples are kept, too.
    assert drawn == [False, False]
    assert both["judge_samples"] == first["judge_samples"]
    assert [point for point in both["points"] if point["num_steps"] == 2] == first["points"]
    assert len(list((run / "evaluations").glob("*.png"))) == 2


@pytest.mark.slow
def test_a_judge_whose_own_samples_are_annealed_says_so(run, judge_run, tmp_path):
    annealing = shutil.copytree(judge_run, tmp_path / "annealing", ignore=shutil.ignore_patterns("evaluations"))
    config = json.loads((annealing / "config.json").read_text())
    config["sampling"] |= {"temperature": 0.5, "top_p": 0.9}
    (annealing / "config.json").write_text(json.dumps(config))
    curve = quality_curves.Curve(samplers=["tweedie"], num_steps=[2])
    title = "the judge's own samples"
    plain = str(quality_curves.table(quality_curves.measure(run, str(judge_run), curve, samples=SAMPLES)))
    assert f"{title} " in plain
    shown = str(quality_curves.table(quality_curves.measure(run, str(annealing), curve, samples=SAMPLES)))
    assert f"{title}, annealed, temperature=0.5, annealed, top_p=0.9 " in shown


@pytest.mark.slow
def test_points_that_another_judge_has_read_are_not_taken_for_this_ones(run, judge_run, monkeypatch):
    """A judge that was trained again has the same name."""
    curve = quality_curves.Curve(samplers=["tweedie"], num_steps=[2])
    before = quality_curves.measure(run, str(judge_run), curve, samples=SAMPLES)["points"]
    read = judges.RunJudge._log_likelihood
    monkeypatch.setattr(judges.RunJudge, "_log_likelihood", lambda judge, batch: 1.1 * read(judge, batch))
    after = quality_curves.measure(run, str(judge_run), curve, samples=SAMPLES)["points"]
    for point, old in zip(after, before, strict=True):
        assert point["gen_ppl_pooled"] == pytest.approx(old["gen_ppl_pooled"] ** 1.1)


@pytest.mark.slow
def test_under_a_control_all_draws_are_precise(run, judge_run):
    curve = quality_curves.Curve(samplers=["tweedie"], num_evaluations=[3])
    found = quality_curves.measure(run, str(judge_run), curve, samples=SAMPLES, temperature=0.8)
    assert [(point["draw"], point["nfe"]) for point in found["points"]] == [("precise", 3)]
    assert "temperature=0.8" in str(quality_curves.table(found))
    assert "published draws" not in str(quality_curves.table(found))


def test_wrong_curves_are_refused(code_run, judge_run, capsys):
    arguments = ["eval", f"--workdir={code_run}", f"--judge={judge_run}", "--num_processes=1"]
    for wrong, message in (
        ("--curve=16,32", "--curve=16,32 is no list of steps: give one such as steps:16,32,64"),
        ("--curve=steps:a", "--curve=steps:a is no list of steps"),
        ("--curve=steps:", "--curve=steps: is no list of steps"),
        ("--curve=steps:4,0 --workdir=nowhere", "--curve=steps:4,0 is no list of steps"),
        ("--curve=nfe:1", "--curve=nfe:1 is too few for tweedie, which takes 2 for a step: give more"),
        ("--curve=steps:2 --samplers=tweedie,mine", "--samplers=mine is unknown: choose one of tweedie"),
        ("--curve=steps:2 --samplers=mine", "--samplers=mine is unknown: choose one of tweedie"),
    ):
        assert cli.main([*arguments, *wrong.split()]) != 0
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    with pytest.raises(errors.UserError, match="is autoregressive, which takes a step for every token"):
        quality_curves.measure(judge_run, str(judge_run), quality_curves.Curve(samplers=["tweedie"], num_steps=[2]))


@pytest.mark.parametrize("length", [1, 2])
def test_evaluations_beyond_the_tokens_are_one_step(code_run, length):
    run = runs.load(code_run)
    data = dataclasses.replace(run.config.data, length=length)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, data=data))
    assert quality_curves._steps_of(run, "first_hitting", 9, {}) == 1
    assert quality_curves._steps_of(run, "tweedie", 9, {}) == 8
