"""`sedd eval`: figures fit together, other text is tokenized as the run's was, and what was stopped goes on."""

import dataclasses
import itertools
import json
import math
import shutil

import jax.numpy as jnp
import pytest

from sedd_jax import runs
from sedd_jax.bounds import likelihoods
from sedd_jax.cli import main as cli
from sedd_jax.data import prepare
from sedd_jax.evaluation import perplexity
from sedd_jax.model import networks


@pytest.fixture
def run(code_run, tmp_path):
    """A copy of the run without evaluations."""
    shutil.copytree(code_run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluations"))
    return tmp_path / "run"


def _evaluate(run, **changed):
    text = {name: changed.pop(name) for name in ("data", "split") if name in changed}
    settings = {"num_times": 2, "batch_size": 16} | changed
    return perplexity.evaluate(run, settings=perplexity.Settings(**settings), **text)


def test_figures_follow_from_each_other(run):
    result = _evaluate(run)
    assert (result["split"], result["step"], result["num_times"], result["protocol"]) == ("valid", 2, 2, "published")
    counts = runs.load(run).split("valid")
    assert result["num_sequences"] * 32 + result["left_out_tokens"] == counts.num_tokens
    assert result["words_per_token"] == pytest.approx((60 * 6 + 60 * 4) / counts.num_tokens)
    for name in ("score_entropy", "cross_entropy"):
        figures = result[name]
        assert figures["ppl_bound"] == pytest.approx(math.exp(figures["nats_per_token"]))
        assert figures["bits_per_character"] == pytest.approx(figures["nats_per_token"] / math.log(2))
        assert math.log(figures["ppl_bound_per_word"]) * result["words_per_token"] == pytest.approx(
            figures["nats_per_token"]
        )
        assert figures["ppl_bound_stderr"] == pytest.approx(figures["ppl_bound"] * figures["nats_per_token_stderr"])


def test_the_strict_protocol_adds_the_terms_at_the_ends(run):
    published, strict, process = _evaluate(run), _evaluate(run, protocol="strict"), runs.load(run).process
    prior = math.exp(-float(process.noise.sigma(jnp.float32(1.0)))) * math.log(process.graph.vocab_size)
    assert strict["prior_nats_per_token"] == pytest.approx(prior, rel=1e-3)
    assert 0 <= strict["reconstruction_nats_per_token"] < 0.05
    for name in ("score_entropy", "cross_entropy"):
        integral = strict[f"{name}_integral_nats_per_token"]
        # The same times and noise, integrated rather than averaged.
        assert integral == pytest.approx(published[name]["nats_per_token"] * 0.999, rel=1e-5)
        total = integral + strict["prior_nats_per_token"] + strict["reconstruction_nats_per_token"]
        assert strict[name]["nats_per_token"] == pytest.approx(total)
    assert "prior" in str(perplexity.table(strict))
    assert "prior" not in str(perplexity.table(published))


def test_other_text_is_tokenized_as_the_runs_was(run, tmp_path):
    source = runs.load(run).config.data.source
    own = _evaluate(run, split="test")
    other = _evaluate(run, data=source)
    prepare.prepare(source, "characters", tmp_path / "prepared", num_workers=1)
    prepared = _evaluate(run, data=f"prepared:{tmp_path / 'prepared'}", split="test")
    for result in (other, prepared):
        assert result["split"] == "test"
        assert result["data_sha256"] == own["data_sha256"]
        assert result["cross_entropy"] == own["cross_entropy"]


def test_text_without_words_has_no_figure_per_word(run, tmp_path):
    (tmp_path / "test.txt").write_text("a=1b" * 500)
    result = _evaluate(run, data=f"text:{tmp_path}/{{split}}.txt", num_times=1)
    assert result["cross_entropy"]["ppl_bound_per_word"] is None
    assert "no figure" in str(perplexity.table(result))


def test_wrong_text_is_refused_in_one_line(run, tmp_path, capsys):
    (tmp_path / "test.txt").write_text("a = Z\n" * 100)
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "test.txt").write_text("a = 1\n")
    prepare.prepare(f"lines:{tmp_path}/{{split}}.txt", "bytes", tmp_path / "prepared", num_workers=1)
    wrong = {
        f"--data=lines:{tmp_path}/{{split}}.txt": "test.txt:1: 'Z' (U+005A) at position 4 is not in the alphabet",
        f"--data=lines:{tmp_path}/short/{{split}}.txt": "has 5 tokens, which length=32 does not fit",
        f"--data=prepared:{tmp_path / 'prepared'}": "was prepared with another tokenizer (bytes)",
        f"--data=lines:{tmp_path}/{{split}}.txt --split=valid": "has no split 'valid': choose one of test",
        "--data=nothing:here": "is of no known kind",
        "--protocol=mine": "--protocol=mine is unknown: choose one of published, strict",
        "--protocol=exact": "--protocol=exact is unknown",
        "--num_times=0": "--num_times=0 must be at least 1",
        "--target_stderr=0": "--target_stderr=0.0 must be above 0",
    }
    for arguments, message in wrong.items():
        assert cli.main(["eval", f"--workdir={run}", "--num_processes=1", *arguments.split()]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_passes_go_on_until_the_error_is_small_enough(run):
    rough = _evaluate(run, num_times=None, target_stderr=0.05)
    fine = _evaluate(run, num_times=None, target_stderr=0.02)
    assert 1 <= rough["num_times"] < fine["num_times"]
    for result, target in ((rough, 0.05), (fine, 0.02)):
        stderrs = [result[name]["nats_per_token_stderr"] for name in ("score_entropy", "cross_entropy")]
        assert max(stderrs) <= target


def test_results_of_earlier_versions_are_shown_with_what_their_errors_are(run):
    result = _evaluate(run)
    assert "± is the standard error over times and noise (4 degrees of freedom)" in str(perplexity.table(result))
    del result["stderr_freedom"]
    assert "± is an upper estimate of an earlier version" in str(perplexity.table(result))


def test_a_single_time_has_no_error(run):
    result = _evaluate(run, num_times=1)
    assert result["cross_entropy"]["ppl_bound_stderr"] is None
    shown = str(perplexity.table(result))
    assert "one pass has no standard error: draw two times or more (--num_times)" in shown
    assert "inf" not in shown


def test_what_was_stopped_goes_on(run, monkeypatch):
    whole = _evaluate(run, num_times=4)
    kept = run / "evaluations"
    (passes,) = kept.glob("*.jsonl")
    assert json.loads(passes.with_suffix(".json").read_text())["config"]["data"]["length"] == 32
    lines = passes.read_text().splitlines(keepends=True)
    assert len(lines) == 4
    passes.write_text("".join(lines[:2]))
    passes.with_suffix(".partial").write_text("".join(lines)[:-20])  # stopped while it wrote
    drawn = []
    draw = likelihoods.passes

    def counted(*args, **kwargs):
        drawn.append(kwargs["first"])
        return draw(*args, **kwargs)

    monkeypatch.setattr(likelihoods, "passes", counted)
    again = _evaluate(run, num_times=4)
    assert drawn == [2, 3]
    assert again == whole
    assert passes.read_text() == "".join(lines)
    fewer = _evaluate(run, num_times=1)
    assert fewer["num_times"] == 1
    assert fewer["cross_entropy"] != whole["cross_entropy"]
    assert len(list(kept.glob("*.jsonl"))) == 1
    _evaluate(run, num_times=1, seed=1)
    assert len(list(kept.glob("*.jsonl"))) == 2


def test_the_command_prints_a_table_and_json(run, capsys):
    arguments = ["--num_processes=1", "--num_times=1", "--json", "--protocol=strict"]
    assert cli.main(["eval", f"--workdir={run}", *arguments]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert "\n".join(table) == str(perplexity.table(result))
    assert f"{result['cross_entropy']['ppl_bound']:.3f}" in "\n".join(table)
    assert max(map(len, itertools.islice(table, 1, None))) <= 110
    assert set(result["versions"]) == {"sedd_jax", "jax", "numpy"}


def test_passes_of_other_weights_of_the_same_step_do_not_count(run):
    """A run that went back and on again has other weights, and its old measurements are still there."""
    run = runs.load(run)
    opened = run.restore()
    text, settings = run.split("valid"), perplexity.Settings(num_times=1, batch_size=8)
    kept = perplexity.Kept(opened, text, "valid", settings)
    with opened.on_devices():
        kept.draw(lambda *_: None, of=1)
    assert len(perplexity.Kept(run.restore(), text, "valid", settings).done) == 1
    params = opened.model.params | {"head_bias": opened.model.params["head_bias"] + 1.0}
    other = dataclasses.replace(opened, model=networks.Model(opened.model.config, params))
    assert perplexity.Kept(other, text, "valid", settings).done == []
