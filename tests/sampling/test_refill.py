"""Texts for many templates: each is drawn once, padding is never attended to, and texts end where they should."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax import runs
from sedd_jax.data import alphabets
from sedd_jax.diffusion import forward, graphs, noise_schedules
from sedd_jax.model import networks
from sedd_jax.reverse import samplers
from sedd_jax.sampling import refill, templates, trajectories
from tests.support import slow

NETWORK = networks.NetworkConfig(
    num_states=30, hidden_size=32, num_layers=1, num_heads=2, cond_dim=16, dtype="float32", remat="none"
)
INPUTS = jnp.zeros((1, 8), jnp.int32), jnp.ones(1)
GRAPH = graphs.Absorbing(vocab_size=29, mask_id=29)


@pytest.fixture(scope="module")
def opened(code_run):
    return runs.load(code_run).restore()


def draw(opened, asked, *, seed=0, **how):
    """The finished sequences in the order in which they come, and the texts by index."""
    run = dataclasses.replace(opened.run, tokenizer=how.pop("tokenizer", opened.run.tokenizer))
    opened, watch = dataclasses.replace(opened, run=run), how.pop("watch", None)
    ends = refill.Ends(**{name: how.pop(name) for name in refill.Ends._fields if name in how})
    settings = run.sampling(**{"num_steps": 5, "num_samples": 8} | how)
    parsed = [templates.parse(run, template) for template in asked]
    with opened.on_devices():
        found = list(refill.draw(opened, parsed, settings, seed=seed, ends=ends, watch=watch))
    return found, {one.index: run.tokenizer.decode(one.tokens) for one in found}


TEMPLATES = ["a = {3}", "", "{2}1\nb = 2{1}", "a = 1", "b{28}"] * 4


@pytest.mark.parametrize(
    ("sampler", "fit"),
    slow.all_but([("first_hitting", True)], [("tweedie", False), ("first_hitting", True), ("theta_trapezoidal", True)]),
)
def test_every_template_comes_back_once_and_keeps_what_is_given(opened, sampler, fit):
    found, texts = draw(opened, TEMPLATES, sampler=sampler, fit=fit)
    assert sorted(texts) == list(range(len(TEMPLATES)))
    assert len(found) == len(TEMPLATES)
    run = opened.run
    for one in found:
        template = templates.parse(run, TEMPLATES[one.index])
        known = template.is_given[: template.length]
        assert len(one.tokens) == template.length
        np.testing.assert_array_equal(one.tokens[known], template.tokens[: template.length][known])
        assert run.graph.mask_id not in one.tokens
        assert (one.nfe == 0) == (template.is_given[: template.length].all())
    assert draw(opened, TEMPLATES, sampler=sampler, fit=fit)[1] == texts
    assert draw(opened, TEMPLATES, sampler=sampler, fit=fit, seed=1)[1] != texts


@pytest.mark.slow
def test_every_place_matches_the_patterns_of_the_template_that_it_holds(opened):
    kinds = [("a = {3:[12]+}", r"a = [12]{3}"), ("{4:(ab)+}{2}", r"(ab){2}..")]
    _, texts = draw(opened, [kinds[i % 2][0] for i in range(20)], sampler="first_hitting", num_steps=99, num_samples=3)
    assert all(re.fullmatch(kinds[i % 2][1], text, re.DOTALL) for i, text in texts.items())
    assert len({texts[i] for i in range(0, 20, 2)}) > 2
    with pytest.raises(ValueError, match="draw=published takes no patterns"):
        draw(opened, ["a{3:1+}"], draw="published")


def test_fitting_takes_evaluations_for_the_gaps_of_the_template_alone(opened):
    found, _ = draw(opened, TEMPLATES, sampler="first_hitting", num_steps=99, fit=True)
    assert {one.index % 5: one.nfe for one in found} == {0: 3, 1: 32, 2: 3, 3: 0, 4: 28}


@pytest.fixture
def network(monkeypatch):
    """Replaces the network: features depend on all tokens that are attended to; gives the shapes of its calls."""
    seen = []

    def apply(model, xt, sigma, dropout_key, lengths):
        seen.append((xt.shape, lengths is not None))
        attended = True if lengths is None else jnp.arange(xt.shape[1])[None] < lengths[:, None]
        total = jnp.where(attended, xt, 0).sum(1)
        angles = total[:, None, None] * jnp.arange(1, model.config.hidden_size + 1)[None, None]
        return 4 * jnp.cos(angles + jnp.arange(xt.shape[1])[None, :, None]).astype(jnp.float32)

    monkeypatch.setattr(networks, "apply", apply)
    trajectories.make_programs.cache_clear()
    yield seen
    trajectories.make_programs.cache_clear()


@pytest.mark.slow
def test_padding_is_never_attended(network):
    process = forward.Process(GRAPH, noise_schedules.LogLinear())
    rules = trajectories.Rules(process=process, sampler=samplers.make("tweedie"))
    shapes = jax.eval_shape(lambda: networks.ScoreNetwork(NETWORK).init(jax.random.key(0), *INPUTS)["params"])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape, scale=0.3), leaf.dtype), shapes)

    def tokens_drawn(padding, *, pads):
        rows = []
        for index, length in enumerate([3, 8, 5, 4, 7, 6]):
            tokens = np.where(np.arange(8) < length, 1, padding).astype(np.int32)
            is_given = (np.arange(8) >= length) | (np.arange(8) == 1)
            rows.append(refill.Row(index, tokens, is_given, length, 4))
        programs = trajectories.make_programs(NETWORK, rules._replace(pads=pads))
        drawn = refill.drive(programs, (params, None), jax.random.key(0), rows, 2)
        return {row.index: tokens[: row.length].tolist() for row, tokens, _ in drawn}

    assert tokens_drawn(0, pads=True) == tokens_drawn(17, pads=True)
    assert tokens_drawn(0, pads=False) != tokens_drawn(17, pads=False)


def test_padded_lengths_are_few():
    assert [refill.padded_length(n, 1000) for n in (0, 1, 128, 129, 256, 512, 513, 1000)] == [
        128,
        128,
        128,
        256,
        256,
        512,
        1000,
        1000,
    ]
    assert refill.padded_length(5, 32) == 32


@pytest.mark.slow
def test_templates_of_other_padded_lengths_are_batches_of_their_own(opened, network, monkeypatch):
    monkeypatch.setattr(refill, "SHORTEST", 8)
    _, texts = draw(opened, ["a{3}", "b = {12}", "a = {4}"], fit=True)
    assert {i: len(text) for i, text in texts.items()} == {0: 4, 1: 16, 2: 8}
    assert set(network) == {((8, 16), True), ((8, 8), True)}


class Ending(alphabets.Characters):
    """Characters; the first one is the end of text."""

    eos_id = 0


def test_text_ends_before_the_first_end_that_is_drawn(opened):
    run = opened.run
    end = run.tokenizer.alphabet[0]
    assert end in "a = 1\nb = 22\n"
    tokenizer = Ending(alphabet=run.tokenizer.alphabet)
    asked = [end + "{20}" + end] * 24
    stopped = draw(opened, asked, stop_at_eos=True, tokenizer=tokenizer)[1]
    assert all(text.startswith(end) and end not in text[1:].removesuffix(end) for text in stopped.values())
    lengths = {len(text) for text in stopped.values()}
    assert max(lengths) <= 22
    assert len(lengths) > 3
    assert {len(text) for text in draw(opened, asked, tokenizer=tokenizer)[1].values()} == {22}
    # A known end-of-text token ends no text.
    assert all(text.endswith(end) for text in stopped.values() if len(text) == 22)


def test_a_tokenizer_without_an_end_cannot_be_stopped_at_it(opened):
    with pytest.raises(ValueError, match=r"stop_at_eos needs an end of text, and config\.data\.tokenizer=characters"):
        draw(opened, ["a{3}"], stop_at_eos=True)


@pytest.mark.slow
def test_an_autoregressive_run_takes_batches(judge_run):
    opened = runs.load(judge_run).restore()
    shown = []
    found, texts = draw(
        opened, ["a = {3}", "", "b"] * 5, fit=True, watch=lambda taken, total, texts: shown.append((taken, total))
    )
    assert [one.index for one in found] == list(range(15))
    assert shown == [(32, 64), (64, 64)]
    assert {one.nfe for one in found} == {32}
    assert all(text.startswith(("a = ", "", "b")[i % 3]) for i, text in texts.items())
    assert [len(texts[i]) for i in range(3)] == [7, 32, 1]
    assert len({texts[i] for i in range(1, 15, 3)}) == 5


def test_an_empty_list_has_no_texts(opened, judge_run):
    for one in (opened, runs.load(judge_run).restore()):
        assert draw(one, []) == ([], {})


def test_watching_tells_of_all_steps_and_changes_nothing(opened):
    shown = []
    asked = ["a = {3}", "b{20}", "{9}"] * 4
    watched = draw(opened, asked, watch=lambda taken, total, texts: shown.append((taken, total, len(texts()))))[1]
    assert watched == draw(opened, asked)[1]
    taken = [taken for taken, *_ in shown]
    assert taken == sorted(taken)
    assert shown[-1][:2] == (12 * 6, 12 * 6)
    assert all(1 <= number <= 8 for *_, number in shown)
