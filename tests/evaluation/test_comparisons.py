"""Two runs are compared at the same times and noise, and the difference has an error of its own."""

import json
import shutil

import pytest

from sedd_jax.cli import main as cli
from sedd_jax.evaluation import comparisons, perplexity


@pytest.fixture
def run(code_run, tmp_path):
    """A copy of the run without evaluations."""
    return shutil.copytree(code_run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluations"))


@pytest.fixture
def earlier(code_run, tmp_path):
    """The same run, under another name."""
    return shutil.copytree(code_run, tmp_path / "earlier", ignore=shutil.ignore_patterns("evaluations"))


SETTINGS = perplexity.Settings(num_times=2, batch_size=16)


def test_a_run_does_not_differ_from_itself(run, earlier):
    """At the same times and noise both have the same bound, so the difference is 0, and its error."""
    result = comparisons.measure(run, str(earlier), settings=SETTINGS)
    alone = perplexity.evaluate(run, settings=SETTINGS)
    assert [row["names"] for row in result["bounds"]] == [("score_entropy",) * 2, ("cross_entropy",) * 2]
    for row in result["bounds"]:
        assert row["nats_per_token"] == row["against_nats_per_token"] == alone[row["names"][0]]["nats_per_token"]
        assert row["difference"] == row["difference_stderr"] == row["half_width"] == 0
        assert alone[row["names"][0]]["nats_per_token_stderr"] > 0
    assert len(list((earlier / "evaluations").glob("likelihood-*.jsonl"))) == 1


def test_the_command_goes_on_until_the_difference_is_known_and_says_how_well(run, judge_run, capsys):
    arguments = ["--num_processes=1", "--batch_size=64", "--target_stderr=0.02", "--json"]
    assert cli.main(["eval", f"--workdir={run}", f"--against={judge_run}", *arguments]) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert "\n".join(shown) == str(comparisons.table(result))
    exact = perplexity.evaluate(judge_run)["negative_log_likelihood"]["nats_per_token"]
    for row in result["bounds"]:
        assert row["names"][1] == "negative_log_likelihood"
        assert row["against_nats_per_token"] == pytest.approx(exact)
        assert row["difference"] == pytest.approx(row["nats_per_token"] - exact)
        assert 0 < row["difference_stderr"] <= 0.02
        assert row["half_width"] > 1.96 * row["difference_stderr"]
    assert "cross-entropy, against exact" in shown[4]
    assert cli.main(["eval", f"--workdir={run}", "--report", "--num_processes=1"]) == 0
    assert "Likelihood against another run" in (run / "report.html").read_text()


def test_the_other_run_is_named_by_its_own_flag(run, capsys):
    assert cli.main(["eval", f"--workdir={run}", "--against=none", "--num_processes=1"]) == 1
    assert "eval: --against=none is not a run directory" in capsys.readouterr().err


def test_runs_that_read_other_tokens_are_not_compared(run, earlier, capsys):
    for field, value, message in (
        ("length", 16, "has sequences of 16 tokens, and this run 32, so the two do not read the same tokens: compare"),
        ("tokenizer", None, "has another tokenizer, so the two do not read the same tokens: compare a run"),
    ):
        if value is None:
            path = earlier / "tokenizer.json"
            tokenizer = json.loads(path.read_text())
            path.write_text(json.dumps(tokenizer | {"alphabet": tokenizer["alphabet"][::-1]}))
        else:
            config = json.loads((earlier / "config.json").read_text())
            config["data"][field] = value
            (earlier / "config.json").write_text(json.dumps(config))
        assert cli.main(["eval", f"--workdir={run}", f"--against={earlier}", "--num_processes=1"]) == 1
        error = capsys.readouterr().err
        assert f"--against={earlier} {message}" in error
        assert error.count("\n") == 1
