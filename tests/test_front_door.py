"""Python's front door does what the commands do, quietly, and says what is wrong in one sentence."""

import json
import math
import pathlib

import jax.numpy as jnp
import pytest

import sedd_jax
from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.bounds import likelihoods, text_bounds
from sedd_jax.cli import main as cli
from sedd_jax.diffusion import forward
from sedd_jax.evaluation import perplexity
from sedd_jax.model import autoregression, networks
from sedd_jax.runtime import errors
from tests.support import places


@pytest.fixture(scope="module")
def opened(code_run):
    return sedd_jax.open(str(code_run))


def test_a_run_is_opened_by_any_kind_of_path_and_describes_itself(code_run, opened):
    assert opened.workdir == sedd_jax.open(pathlib.Path(code_run), step=2).workdir == pathlib.Path(code_run)
    assert opened.step == 2
    assert opened.config == runs.load(code_run).config
    assert isinstance(opened.model, networks.Model)
    assert isinstance(opened.process, forward.Process)
    assert opened.tokenizer.decode(opened.tokenizer.encode("a = 1")) == "a = 1"
    assert repr(opened).startswith(f"<sedd_jax run {code_run}, step 2, absorb, ")


def test_it_samples_as_the_command_does_and_says_nothing(code_run, opened, capfd):
    drawn = opened.sample(template="a = {5}", num_samples=8, num_steps=3, sampler="euler", seed=4)
    assert capfd.readouterr() == ("", "")
    flags = ["--template=a = {5}", "--num_samples=8", "--num_steps=3", "--sampler=euler", "--seed=4", "--json"]
    assert cli.main(["sample", f"--workdir={code_run}", "--num_processes=1", *flags]) == 0
    assert [one.to_dict() for one in drawn] == json.loads(capfd.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_it_fills_each_template_once_in_the_order_given(opened):
    asked = ["a = {3}", "b{20}", "{2}1\nb = 2{1}", "a = 1"] * 3
    filled = opened.infill(asked, num_steps=4, num_samples=8)
    assert [len(text) for text in filled] == [7, 21, 10, 5] * 3
    assert all(text.startswith(asked[i].partition("{")[0]) for i, text in enumerate(filled))
    assert opened.infill("a = {3}", num_steps=4, num_samples=8, fit=True)[0].startswith("a = ")


def test_no_two_windows_share_draws_whatever_the_seeds(opened, monkeypatch):
    seen = []

    def bound_window(opened, window, num_times, seed):
        seen.append(seed)
        return "score_entropy", likelihoods.Estimate(1.0, 0.1, 1.0)

    monkeypatch.setattr(text_bounds, "_bound_window", bound_window)
    for seed in (0, 1, 0):
        opened.bound("a = 1\n" * 40, seed=seed)
    assert len(set(seen)) == 2 * (len(seen) // 3) > 2
    assert seen[-len(seen) // 3 :] == seen[: len(seen) // 3]


@pytest.mark.slow
def test_the_bound_of_a_text_is_exact_for_the_baseline(judge_run):
    run = sedd_jax.open(judge_run)
    text = "a = 1\nb = 22\n" * 4  # A window of the model's length, and a shorter one.
    bound = run.bound(text)
    tokens = run.tokenizer.encode(text)
    windows = [tokens[:32], tokens[32:]]
    exact = sum(
        float(autoregression.log_likelihood(run.model, jnp.asarray(window[None]), run.process.graph).sum())
        for window in windows
    )
    assert bound.name == "negative_log_likelihood"
    assert bound.nats_per_token * len(tokens) == pytest.approx(-exact, rel=1e-5)
    assert bound.nats_per_token_stderr == 0
    assert bound.bits_per_character == pytest.approx(bound.nats_per_token / math.log(2))


def test_the_bound_of_a_text_is_what_evaluation_finds_for_it(opened, code_run, tmp_path, capfd):
    text = "a = 1\nb = 22\n" * 3
    text = text[:32]
    (tmp_path / "test.txt").write_text(text * 40)
    bound = opened.bound(text, num_times=2000)
    assert bound.name == "cross_entropy"
    assert (bound.num_tokens, bound.num_characters) == (32, 32)
    settings = perplexity.Settings(num_times=8)
    found = perplexity.evaluate(code_run, data=f"text:{tmp_path}/{{split}}.txt", settings=settings)["cross_entropy"]
    apart = abs(bound.nats_per_token - found["nats_per_token"])
    assert apart < 5 * math.hypot(bound.nats_per_token_stderr, found["nats_per_token_stderr"])
    assert bound.nats_per_token_stderr < 0.05 * bound.nats_per_token


def test_the_bound_of_held_out_text_is_that_of_the_command(opened, code_run, capfd):
    bound = opened.bound(num_times=1)
    assert capfd.readouterr() == ("", "")
    assert cli.main(["eval", f"--workdir={code_run}", "--num_processes=1", "--num_times=1", "--json"]) == 0
    found = json.loads(capfd.readouterr().out.splitlines()[-1])["cross_entropy"]
    assert bound.nats_per_token == found["nats_per_token"]
    assert bound.bits_per_character == pytest.approx(found["bits_per_character"], rel=1e-3)


@pytest.mark.slow
def test_it_trains_from_fields_a_file_or_a_config_and_goes_on(code_run, tmp_path, capfd):
    fields = configs.to_dict(runs.load(code_run).config)
    run = sedd_jax.train(fields, tmp_path / "run")
    assert capfd.readouterr() == ("", "")
    assert run.step == 2
    fields["training"]["num_steps"] = 3
    (tmp_path / "config.py").write_text(f"def get_config():\n    return {fields!r}\n")
    assert sedd_jax.train(tmp_path / "config.py", str(tmp_path / "run")).step == 3
    assert sedd_jax.train(run.config, tmp_path / "other").step == 2
    sedd_jax.train(fields, tmp_path / "loud", verbose=True)
    assert "step 3/3" in capfd.readouterr().err


def test_the_example_of_the_readme_is_true(code_run, tmp_path, monkeypatch, capsys):
    """Its Python, with the run of these tests in place of the quick start and words that the tokenizer knows."""
    readme = (places.REPOSITORY / "README.md").read_text(encoding="utf-8")
    code = readme.partition("```python\n")[2].partition("```")[0]
    replacements = {
        "runs/quickstart": str(code_run),
        "runs/second": str(tmp_path / "second"),
        "Hi {12}": "a = {4}",
        "num_samples=2": "num_samples=8",
        "The {5} method returns {8} object.": "a = {2}\nb{3}",
        "The method returns an object.": "a = 22",
    }
    for old, new in replacements.items():
        assert old in code
        code = code.replace(old, new.replace("\n", "\\n"))
    exec(compile(code, "README.md", "exec"), {})
    assert "nats_per_token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: run.sample(template="a{3"), r"template has '\{3' at position 1: a gap is"),
        (lambda run: run.sample(sampler="none"), r"config\.sampling\.sampler=none is unknown: choose one of tweedie"),
        (lambda run: run.sample(steps=3), "steps is no setting: give some of sampler, num_steps"),
        (lambda run: run.sample(template="a", prefix="b"), "template cannot be combined with prefix or suffix"),
        (lambda run: run.bound(""), "text='' holds no token"),
        (lambda run: run.bound("a", split="test"), "text goes without split"),
        (lambda run: sedd_jax.open("nowhere"), "workdir=nowhere is not a run directory"),
        (lambda run: sedd_jax.open(run.workdir, step=7), "step=7"),
        (lambda run: sedd_jax.train("nowhere.py", "x"), "config=nowhere.py is not a file"),
        (
            lambda run: sedd_jax.train({"trainin": {"x": 1}}, "x"),
            r"config\.trainin is not a field: did you mean config\.training\?",
        ),
    ],
)
def test_what_is_wrong_is_said_as_python_spells_it(opened, call, message):
    with pytest.raises(sedd_jax.UserError, match=message) as caught:
        call(opened)
    assert "--" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_to_fill_is_filled(opened):
    assert opened.infill([]) == []


@pytest.mark.parametrize("number", [0, -1])
def test_a_bound_without_draws_is_refused(opened, number):
    with pytest.raises(errors.UserError, match=f"num_times={number} must be at least 1"):
        opened.bound("a = 1", num_times=number)
