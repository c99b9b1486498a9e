"""Samples are read by the judge token by token, and their entropy and n-grams are counted."""

import dataclasses
import json
import math

import numpy as np
import pytest

from sedd_jax import runs
from sedd_jax.cli import main as cli
from sedd_jax.evaluation import generation_quality, judges, perplexity


@pytest.mark.slow
def test_all_held_out_text_has_the_perplexity_that_evaluation_finds(code_run, judge_run):
    num = runs.load(code_run).split("valid").num_sequences
    samples = generation_quality.Samples(num_samples=num, batch_size=16)
    result = generation_quality.measure(code_run, str(judge_run), samples=samples)
    exact = perplexity.evaluate(judge_run)["negative_log_likelihood"]
    assert result["held_out"]["gen_ppl_pooled"] == pytest.approx(exact["ppl_bound"], rel=1e-5)
    assert result["held_out"]["gen_ppl_per_sequence"] >= result["held_out"]["gen_ppl_pooled"]
    assert (result["num_samples"], result["nfe"], result["draw"]) == (num, 5, "precise")
    assert result["samples"]["gen_ppl_pooled"] != result["held_out"]["gen_ppl_pooled"]


def test_perplexity_is_of_sequences_or_of_all_their_tokens():
    found = generation_quality._perplexities([np.log([0.5, 0.5]), np.log([0.1]), np.zeros(0)])
    assert found["gen_ppl_per_sequence"] == pytest.approx((2 + 10) / 2)
    assert found["gen_ppl_per_sequence_stderr"] == pytest.approx(np.std([2, 10], ddof=1) / math.sqrt(2))
    assert found["gen_ppl_pooled"] == pytest.approx(40 ** (1 / 3))
    assert found["num_unread"] == 1
    # Of two draws, the first of the second sequence and both of the third are empty.
    draws = [np.log([0.5]), np.zeros(0), np.zeros(0), np.log([0.25]), np.log([0.1]), np.zeros(0)]
    assert generation_quality._perplexities(draws, 2)["gen_ppl_per_sequence"] == pytest.approx((3 + 10) / 2)
    nothing = generation_quality._perplexities([np.zeros(0)])
    assert (nothing["gen_ppl_per_sequence"], nothing["gen_ppl_pooled"], nothing["num_unread"]) == (None, None, 1)


def test_entropy_and_n_grams_are_counted():
    tokens = np.array([[0, 1, 0, 1], [2, 2, 2, 2]], np.int32)
    assert generation_quality._entropies(tokens) == pytest.approx([math.log(2), 0])
    found = generation_quality._diversity(tokens)
    assert found["distinct_1"] == 3 / 8
    assert found["distinct_2"] == 3 / 6  # 01, 10, 22
    assert found["distinct_3"] == 3 / 4


def test_the_command_warns_of_samples_with_too_little_entropy(code_run, judge_run, monkeypatch, capsys):
    arguments = ["eval", f"--workdir={code_run}", "--generate", "--num_processes=1", "--num_samples=3", "--json"]
    assert cli.main([*arguments, f"--judge={judge_run}", "--draw=published", "--num_steps=2"]) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert (result["draw"], result["nfe"], result["num_samples"]) == ("published", 3, 3)
    assert f"{result['samples']['gen_ppl_pooled']:.3f}" in printed
    same = {**result, "samples": result["held_out"]}
    assert "warning" not in str(generation_quality.table(same))
    annealed = {**result["held_out"], "unigram_entropy": result["held_out"]["unigram_entropy"] - 0.2}
    assert "warning: samples have less entropy" in str(generation_quality.table({**result, "samples": annealed}))
    assert cli.main(arguments) == 2
    assert "--judge=RUN must be given" in capsys.readouterr().err
    assert cli.main([*arguments, f"--judge={code_run}"]) == 1
    assert (
        f"--judge={code_run} is not an autoregressive run: train one with config.graph.name=autoregressive"
        in capsys.readouterr().err
    )


def test_batches_of_samples_differ(code_run):
    opened = runs.load(code_run).restore()
    sampling = dataclasses.replace(opened.run.config.sampling, num_samples=2)
    drawn = generation_quality.draw(opened, sampling, 3, seed=0)
    assert drawn.shape == (3, 32)
    assert not np.array_equal(drawn[0], drawn[2])
    assert np.array_equal(drawn, generation_quality.draw(opened, sampling, 3, seed=0))


def test_what_is_given_of_each_sequence_is_kept(code_run):
    opened = runs.load(code_run).restore()
    sampling = dataclasses.replace(opened.run.config.sampling, num_samples=2)
    random = np.random.default_rng(0)
    tokens = random.integers(0, opened.run.tokenizer.vocab_size, (3, 32)).astype(np.int32)
    is_given = random.random((3, 32)) < 0.5
    filled = generation_quality.fill(opened, sampling, tokens, is_given, seed=0)
    assert (filled == tokens)[is_given].all()
    assert (filled != tokens)[~is_given].any()


def test_what_is_too_short_for_pairs_or_triples_has_no_figure_of_them():
    found = generation_quality._diversity(np.array([[0, 1], [0, 1]]))
    assert found == {"distinct_1": 0.5, "distinct_2": 0.5, "distinct_3": None}
    assert [generation_quality.cell(found, name) for name in found] == ["0.500", "0.500", "no figure"]


def test_tokens_that_a_judge_does_not_read_count_as_those_it_reads(code_run):
    """A nat for every token that it reads, which are all but the first of each window of eight."""

    class Judge(judges.Judge):
        name, length, first = "toy", 8, 1

        def _shares(self, run, token):
            return True

        def _encode(self, texts):
            raise AssertionError

        def _log_likelihood(self, batch):
            return np.full((batch.shape[0], batch.shape[1] - 1), -1.0)

        def _features(self, batch):
            raise AssertionError

    tokens = np.tile(np.arange(32) % 4, (3, 1)).astype(np.int32)
    found = generation_quality.read(runs.load(code_run), Judge(), tokens)
    assert found["cross_entropy"] == pytest.approx(1.0)
    assert found["divergence"] == pytest.approx(1.0 - math.log(4))
    assert found["gen_ppl_pooled"] == pytest.approx(math.e)
