"""Gaps in held-out windows are refilled, counted where they come back, and read by the judge."""

import json

import numpy as np
import pytest

from sedd_jax import runs
from sedd_jax.cli import main as cli
from sedd_jax.evaluation import generation_quality, judges, refilling


@pytest.mark.parametrize(
    ("pattern", "given"),
    [
        ("paper", [1] * 25 + [0] * 50 + [1] * 25),
        ("prompt", [1] * 50 + [0] * 50),
        ("2{3}1{1}", [1, 1, 0, 0, 0, 1, 0]),
        ("{2}", [0, 0]),
    ],
)
def test_a_pattern_says_what_is_given(pattern, given):
    assert refilling.parse(pattern).astype(int).tolist() == given


@pytest.mark.parametrize(
    "pattern", ["", "25", "25{0}25", "a{3}", "{3", "{-1}", "2 {3}", "papers", "25{99999999}25", "1" * 5000 + "{1}"]
)
def test_what_is_no_pattern_is_refused(pattern):
    with pytest.raises(ValueError, match="is not a pattern: give numbers of known and"):
        refilling.parse(pattern)


def test_what_comes_back_is_counted(code_run, judge_run, monkeypatch):
    wrong = []

    def spoiled(opened, sampling, tokens, is_given, seed):
        """Text as it was, but for one missing token of the first two windows, and what follows the window."""
        assert is_given[:, [0, 1, 2, 9]].all()
        assert not is_given[:, 3:9].any()
        assert not is_given[:, 10:].any()
        found = tokens.copy()
        found[:, 10:] = 0
        found[:2, 4] = (found[:2, 4] + 1) % opened.run.tokenizer.vocab_size
        wrong.append(seed)
        return found

    monkeypatch.setattr(generation_quality, "fill", spoiled)
    samples = generation_quality.Samples(num_samples=8)
    result = refilling.measure(code_run, "3{6}1", judge=str(judge_run), samples=samples, num_draws=2)
    assert result["tokens_matched"] == pytest.approx(1 - 2 / 48)
    assert result["windows_matched"] == pytest.approx(6 / 8)
    # Of eight windows, however often each is filled.
    assert result["tokens_matched_stderr"] == pytest.approx(np.std([5 / 6] * 2 + [1] * 6, ddof=1) / 8**0.5)
    assert result["windows_matched_stderr"] == pytest.approx(np.std([0] * 2 + [1] * 6, ddof=1) / 8**0.5)
    texts = [generation_quality.held_out(runs.load(code_run), 8, 0)[0][:, 3:9][row].tolist() for row in range(8)]
    same = [a == b for row in range(8) for a, b in zip(texts[row], texts[row - 1], strict=True)]
    assert result["tokens_matched_by_chance"] == pytest.approx(np.mean(same))
    assert wrong == [0, 1]
    judge, run = judges.open_judge(str(judge_run)), runs.load(code_run)
    real, _ = generation_quality.held_out(run, 8, 0)
    assert result["held_out"] == generation_quality.read(run, judge, real[:, :10])
    refilled = np.concatenate([real[:, :10]] * 2)
    refilled[[0, 1, 8, 9], 4] = (refilled[[0, 1, 8, 9], 4] + 1) % run.tokenizer.vocab_size
    alone = generation_quality.read(run, judge, refilled[:8])
    for name in ("gen_ppl_per_sequence_stderr", "unigram_entropy_stderr"):
        assert result["refilled"][name] == pytest.approx(alone[name])
    assert result["refilled"]["gen_ppl_pooled"] != result["held_out"]["gen_ppl_pooled"]
    assert result["texts"][7].count("[") == 1
    assert len(result["texts"][7]) == 10 + 2


def test_the_command_prints_and_keeps_what_it_found(code_run, judge_run, capsys):
    arguments = ["eval", f"--workdir={code_run}", "--num_processes=1", "--num_samples=8", "--json"]
    assert cli.main([*arguments, "--infill=4{8}4", f"--judge={judge_run}"]) == 0
    *printed, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert "\n".join(printed) == str(refilling.table(result))
    assert "no MAUVE: it takes 1000 windows (--num_samples)" in printed
    assert result["nfe"] == 5
    assert result["data_sha256"] == runs.load(code_run).split("valid").sha256
    assert cli.main([*arguments, "--infill=4{8}4"]) == 0
    assert "perplexity" not in capsys.readouterr().out
    assert cli.main([*arguments, "--infill=paper"]) == 1
    assert "--infill=paper takes 100 tokens, the run's sequences have 32" in capsys.readouterr().err


def test_a_single_window_matches_no_other_by_chance(code_run, monkeypatch):
    monkeypatch.setattr(generation_quality, "fill", lambda opened, sampling, tokens, is_given, seed: tokens)
    result = refilling.measure(code_run, "1{1}", samples=generation_quality.Samples(num_samples=1))
    assert result["tokens_matched_by_chance"] is None
    assert "no figure" in str(refilling.table(result))


@pytest.mark.slow
def test_a_baseline_continues_a_prompt_and_fills_nothing_else(judge_run):
    samples = generation_quality.Samples(num_samples=4)
    result = refilling.measure(judge_run, "4{28}", samples=samples)
    assert (result["sampler"], result["nfe"]) == ("autoregressive", 32)
    with pytest.raises(ValueError, match="sees no text after a gap"):
        refilling.measure(judge_run, "4{8}4", samples=samples)


def test_mauve_tells_text_from_other_text(code_run, judge_run, monkeypatch):
    pytest.importorskip("mauve")
    run, judge = runs.load(code_run), judges.open_judge(str(judge_run))
    random = np.random.default_rng(0)
    real = random.integers(0, 4, (200, 16)).astype(np.int32)
    other = random.integers(4, 8, (200, 16)).astype(np.int32)
    alike = random.integers(0, 4, (200, 16)).astype(np.int32)
    monkeypatch.setattr(refilling, "_WINDOWS_FOR_MAUVE", 200)
    # A judge of one number: the share of low tokens.
    features = lambda texts: np.array([[row.mean(), row[0]] for (row,) in texts], np.float32)
    monkeypatch.setattr(judge, "features", features)
    assert refilling._mauve(run, judge, real, [alike])["mauve"] > 0.9
    found = refilling._mauve(run, judge, real, [other, other])
    assert found["mauve"] < 0.2
    assert found["mauve_stderr"] == 0
    assert "it takes 200 windows" in refilling._mauve(run, judge, real[:199], [alike[:199]])["without_mauve"]
    monkeypatch.setitem(__import__("sys").modules, "mauve", None)
    assert "pip install 'sedd_jax[mauve]'" in refilling._mauve(run, judge, real, [alike])["without_mauve"]
