"""Judges give every token the likelihood that their model gives it, in windows of their length."""

import dataclasses
import json
import shutil

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
    found = judge.log_likelihoods([[row] for row in rows])
    for row, values in zip(rows, found, strict=True):
        windows = [np.asarray(read(row[None, at : at + 32]))[0] for at in range(0, len(row), 32)]
        np.testing.assert_allclose(values, np.concatenate([np.zeros(0), *windows]), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_features_of_a_run_have_read_the_whole_window(judge, rows):
    model, mask = judge.opened.model, judge.run.graph.mask_id
    found = judge.features([[row] for row in rows])
    for number, read in ((0, 5), (2, 31)):  # A full window's last token is not read.
        inputs = np.concatenate([[mask], rows[number][:read]]).astype(np.int32)[None]
        expected = networks.apply(model, jnp.asarray(inputs), jnp.zeros(1))[0, -1]
        np.testing.assert_allclose(found[number], expected, rtol=1e-3, atol=1e-4)


def test_another_tokenizer_reads_the_text(code_run, judge_run):
    run, judge = runs.load(code_run), judges.RunJudge(judge_run)
    tokens = run.split("valid").sequences()[:2].astype(np.int32)
    assert [row.tolist() for (row,) in judge.tokens(run, tokens)] == tokens.tolist()
    judge.run = dataclasses.replace(judge.run, tokenizer=alphabets.Bytes())
    texts = [bytes(row.tolist()).decode() for (row,) in judge.tokens(run, tokens)]
    assert texts == [run.tokenizer.decode(row) for row in tokens]


class Ended(alphabets.Characters):
    """Characters after the first id, the end of a text, which is written in words."""

    eos_id = 0

    def decode(self, ids):
        return "".join("<|endoftext|>" if id_ == 0 else self.alphabet[id_] for id_ in ids)


def test_an_end_of_text_is_no_text_for_a_judge_of_another_tokenizer(code_run, judge):
    ended = Ended(alphabet="\x01" + runs.load(code_run).tokenizer.alphabet)
    run = dataclasses.replace(runs.load(code_run), tokenizer=ended)
    first, second = (judge.run.tokenizer.encode(text) for text in ("a = 1\nb", " = 22\n"))
    row = np.concatenate([[0], first + 1, [0, 0], second + 1, [0]]).astype(np.int32)
    empty = np.zeros_like(row)
    samples = judge.tokens(run, np.stack([row, empty]))
    assert [[part.tolist() for part in parts] for parts in samples] == [[first.tolist(), second.tolist()], [[]]]
    found = judge.log_likelihoods(samples)
    apart = judge.log_likelihoods([[first], [second]])
    np.testing.assert_allclose(found[0], np.concatenate(apart), rtol=1e-5)
    assert len(found[1]) == 0
    np.testing.assert_allclose(judge.features(samples)[0], judge.features([[second]])[0], rtol=1e-4, atol=1e-5)


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


@pytest.mark.slow
def test_a_model_of_transformers_reads_all_but_the_first_token(gpt2, code_run):
    import torch
    import transformers

    run, judge = runs.load(code_run), judges.open_judge(str(gpt2))
    assert (judge.first, judge.length) == (1, 24)
    tokens = run.split("valid").sequences()[:3].astype(np.int32)
    samples = judge.tokens(run, tokens)
    rows = [row for (row,) in samples]
    assert len(rows[0]) == 32
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2)
    found, features = judge.log_likelihoods(samples), judge.features(samples)
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


def test_an_end_of_text_that_the_judge_knows_stays_where_it_is(gpt2, code_run):
    """As in the published figures, where samples of GPT-2's tokens are read by GPT-2."""
    ended = Ended(alphabet="\x01" + runs.load(code_run).tokenizer.alphabet)
    run, judge = dataclasses.replace(runs.load(code_run), tokenizer=ended), judges.open_judge(str(gpt2))
    row = np.concatenate([[1, 2], [0], [3, 4]]).astype(np.int32)[None]
    assert len(judge.tokens(run, row)[0]) == 2
    judge._tokenizer.eos_token = "<|endoftext|>"
    ((whole,),) = judge.tokens(run, row)
    assert whole.tolist() == judge._encode([ended.decode(row[0])])[0].tolist()


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


@pytest.mark.parametrize(
    "changed", [{"n_embd": "wide"}, {"n_head": 0}, {"n_embd": []}, {"layer_norm_epsilon": {}}, {"model_type": []}]
)
def test_a_damaged_config_of_a_judge_is_named(gpt2, tmp_path, changed):
    directory = shutil.copytree(gpt2, tmp_path / "judge")
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(content | changed))
    with pytest.raises(errors.UserError, match=r"cannot be read by transformers: .*: give a directory that holds"):
        judges.open_judge(str(directory))


def test_a_judge_without_a_length_is_refused(gpt2, tmp_path):
    transformers = pytest.importorskip("transformers")
    directory = shutil.copytree(gpt2, tmp_path / "judge")
    config = transformers.MambaConfig(vocab_size=256, hidden_size=8, num_hidden_layers=1, state_size=2)
    transformers.MambaForCausalLM(config).save_pretrained(directory)
    with pytest.raises(errors.UserError, match=r"is a mamba, whose config does not say how long its texts may be"):
        judges.open_judge(str(directory))


def test_a_judge_whose_tokenizer_needs_a_package_names_it(gpt2, monkeypatch):
    transformers = pytest.importorskip("transformers")

    def fail(*_, **__):
        raise ImportError("needs protobuf")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(errors.UserError, match=r"cannot be read by transformers: ImportError: needs protobuf"):
        judges.open_judge(str(gpt2))


def test_transformers_is_asked_for_where_it_is_missing(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(errors.UserError, match=r"needs transformers and torch: pip install 'sedd_jax\[judge\]'"):
        judges.open_judge(str(tmp_path))
