"""Judges give every token the likelihood that their model gives it, in windows of their length."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax import runs
from sedd_jax.data import alphabets
from sedd_jax.evaluation import generation_quality, judges
from sedd_jax.model import autoregression, networks
from sedd_jax.runtime import errors


@pytest.fixture
def judge(judge_run):
    """The run as a judge, its parameters moved so that tokens differ."""
    judge = judges.RunJudge(judge_run)
    model = judge.opened.model
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(0), x.shape), model.params)
    judge.opened = dataclasses.replace(judge.opened, model=networks.Model(model.config, params))
    return judge


@pytest.fixture
def rows(judge):
    random = np.random.default_rng(0)
    return [random.integers(0, judge.run.tokenizer.vocab_size, n).astype(np.int32) for n in (5, 32, 37, 0, 64)]


def test_a_run_reads_windows_from_the_start_of_each_sequence(judge, rows):
    model, graph = judge.opened.model, judge.run.graph
    read = jax.jit(lambda x: autoregression.log_likelihood(model, x, graph))
    found = judge.log_likelihoods(rows)
    for row, values in zip(rows, found, strict=True):
        windows = [np.asarray(read(row[None, at : at + 32]))[0] for at in range(0, len(row), 32)]
        np.testing.assert_allclose(values, np.concatenate([np.zeros(0), *windows]), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_features_of_a_run_have_read_the_whole_window(judge, rows):
    model, mask = judge.opened.model, judge.run.graph.mask_id
    found = judge.features(rows)
    for number, read in ((0, 5), (2, 31)):  # A full window's last token is not read.
        inputs = np.concatenate([[mask], rows[number][:read]]).astype(np.int32)[None]
        expected = networks.apply(model, jnp.asarray(inputs), jnp.zeros(1))[0, -1]
        np.testing.assert_allclose(found[number], expected, rtol=1e-3, atol=1e-4)


def test_another_tokenizer_reads_the_text(code_run, judge_run):
    run, judge = runs.load(code_run), judges.RunJudge(judge_run)
    tokens = run.split("valid").sequences()[:2].astype(np.int32)
    assert [row.tolist() for row in judge.tokens(run, tokens)] == tokens.tolist()
    judge.run = dataclasses.replace(judge.run, tokenizer=alphabets.Bytes())
    texts = [bytes(row.tolist()).decode() for row in judge.tokens(run, tokens)]
    assert texts == [run.tokenizer.decode(row) for row in tokens]


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory):
    """A directory with a random GPT-2 of 24 positions that reads bytes."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import tokenizers
    import torch

    directory = tmp_path_factory.mktemp("gpt2")
    letters = {letter: number for number, letter in enumerate(tokenizers.pre_tokenizers.ByteLevel.alphabet())}
    reader = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=letters, merges=[]))
    reader.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=reader).save_pretrained(directory)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=256, n_positions=24, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


def test_a_model_of_transformers_reads_all_but_the_first_token(gpt2, code_run):
    import torch
    import transformers

    run, judge = runs.load(code_run), judges.open_judge(str(gpt2))
    assert (judge.first, judge.length) == (1, 24)
    tokens = run.split("valid").sequences()[:3].astype(np.int32)
    rows = judge.tokens(run, tokens)
    assert len(rows[0]) == 32
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2)
    found, features = judge.log_likelihoods(rows), judge.features(rows)
    for row, values, feature in zip(rows, found, features, strict=True):
        expected = []
        for window in (row[:24], row[24:]):
            ids = torch.tensor(window[None].astype(np.int64))
            with torch.no_grad():
                log_p = torch.log_softmax(model(ids).logits[0], dim=-1)
            expected += [float(log_p[at, token]) for at, token in enumerate(window[1:])]
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            last = model.transformer(torch.tensor(row[None, :24].astype(np.int64))).last_hidden_state[0, -1]
        np.testing.assert_allclose(feature, last.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_samples_are_read_by_a_model_of_transformers(gpt2, code_run):
    samples = generation_quality.Samples(num_samples=3, batch_size=2)
    result = generation_quality.measure(code_run, str(gpt2), samples=samples)
    assert result["samples"]["gen_ppl_pooled"] > 1
    assert "every token but the first" in str(generation_quality.table(result))
    assert "gpt2" in result["judge"]


def test_what_is_no_judge_is_refused_in_one_line(code_run, tmp_path):
    for content, message in (
        ('{"model_type": "gpt2"}', "cannot be read by transformers"),
        ('{"model_type"', "config.json is damaged"),
        ("null", "config.json is damaged"),
        ('["model_type"]', "config.json is damaged"),
    ):
        if "transformers" in message:
            pytest.importorskip("transformers")
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(errors.UserError, match=f"judge={tmp_path} .*{message}"):
            judges.open_judge(str(tmp_path))
    with pytest.raises(errors.UserError, match=f"judge={code_run} is not an autoregressive run"):
        judges.open_judge(str(code_run))
    with pytest.raises(errors.UserError, match=f"judge={tmp_path}/nothing is not a run directory"):
        judges.open_judge(str(tmp_path / "nothing"))


def test_transformers_is_asked_for_where_it_is_missing(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(errors.UserError, match=r"needs transformers and torch: pip install 'sedd_jax\[judge\]'"):
        judges.open_judge(str(tmp_path))
