"""Patterns and guidance on the uniform graph, whose gaps hold tokens at any time instead of masks."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax import runs
from sedd_jax.data import alphabets
from sedd_jax.diffusion import graphs
from sedd_jax.model import controls, networks, score_heads
from sedd_jax.reverse import samplers, steps
from sedd_jax.sampling import constraints, draws, generate, patterns, refill, templates, trajectories
from tests.support import oracles, slow, small_runs

LENGTH, DRAWS, SIGMA = 3, 8000, 0.7
PATTERN = "a+b|(b|c){2}a*|cab.*"
TOKENIZER = alphabets.Characters(alphabet="abc")
GRAPH = graphs.Uniform(vocab_size=3)
TEXTS = list(itertools.product(range(3), repeat=LENGTH))


def posterior_of(model, features, xt, temperature):
    """p(x0 | xt) of each position alone, [L, 3], from the changed distribution of a token given all others."""
    log_score = score_heads.log_score(model, features, jnp.asarray(xt[None]), jnp.full(1, SIGMA))
    score = np.exp(np.float64(log_score[0]))
    stays = np.exp(-SIGMA)
    r = np.maximum((score / score.sum(-1, keepdims=True) - (1 - stays) / 3) / stays, 0) ** (1 / temperature)
    return r * (stays * np.eye(3)[xt] + (1 - stays) / 3)


# Without `normalize`, the distribution follows from a score that is known for other tokens than the current one.
STEPS = [(normalize, after, known) for normalize in (True, False) for after in (0.0, 0.3) for known in ("", "b")]


@pytest.mark.parametrize(("normalize", "after", "known"), slow.all_but([(True, 0.3, ""), (False, 0.0, "b")], STEPS))
def test_a_step_has_the_distribution_given_that_the_clean_text_matches(normalize, after, known, monkeypatch):
    config = networks.NetworkConfig(
        num_states=3, hidden_size=8, scale_by_sigma=False, dtype="float32", normalize=normalize
    )
    rng = np.random.default_rng(3)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"head_kernel": normal(8, config.padded_states) / 8, "head_bias": jnp.zeros(config.padded_states)}
    model, features = networks.Model(config, params), normal(1, LENGTH, 8)
    monkeypatch.setattr(networks, "apply", lambda model, xt, sigma, *_: jnp.broadcast_to(features, (*xt.shape, 8)))
    automaton, initial = patterns.compile([PATTERN], TOKENIZER, GRAPH)
    places = patterns.place([patterns.Gap(0, LENGTH, PATTERN)], LENGTH, automaton, initial)
    # At the last position no text that matches has the current token.
    xt = np.array([1, 0, 2], np.int32)
    is_given = np.arange(LENGTH) < len(known)
    tile = lambda x: jnp.asarray(np.tile(x[None], (DRAWS, 1)))

    def draw(key, given, xt, places):
        own = draws.NetworkDraws(
            model=model,
            graph=GRAPH,
            given=given,
            patterns=constraints.Patterns(automaton, places),
            control=controls.Control(temperature=0.8),
            draw="precise",
        )
        sigma = jnp.full(DRAWS, SIGMA)
        denoise = lambda total: GRAPH.denoise_jump(total, xt, sigma)
        step = lambda total: GRAPH.tweedie_jump(total, xt, sigma - after)
        return own.draws.move(key, xt, sigma, given.is_movable(GRAPH, xt), step if after else denoise)

    given = steps.Given(tile(np.full(LENGTH, 1, np.int32)), tile(is_given))
    drawn = jax.jit(draw)(jax.random.key(1), given, tile(xt), jax.tree.map(tile, places))

    changes = lambda noise: np.exp(-noise) * np.eye(3) + (1 - np.exp(-noise)) / 3
    alone = posterior_of(model, features, xt, 0.8)
    alone[is_given] = np.eye(3)[xt[is_given]]
    expected = np.zeros((3,) * LENGTH)
    for text in TEXTS:
        if not re.fullmatch(PATTERN, "".join("abc"[token] for token in text)):
            continue
        moved = np.ones(())
        for position, token in enumerate(text):
            to = changes(after)[token] * changes(SIGMA - after)[:, xt[position]] / changes(SIGMA)[token, xt[position]]
            if is_given[position]:
                to = np.eye(3)[xt[position]]
            moved = moved[..., None] * alone[position, token] * to
        expected += moved
    expected = expected.reshape(-1) / expected.sum()
    counts = np.bincount(np.asarray(drawn) @ [9, 3, 1], minlength=27)
    assert (expected > 0).sum() == {(0.0, ""): 6, (0.0, "b"): 2, (0.3, ""): 27, (0.3, "b"): 9}[after, known]
    assert not counts[expected == 0].any()
    assert oracles.chi_square_p(counts, expected) > 1e-4


@pytest.fixture(scope="module")
def opened(code_run):
    """A run on the uniform graph that nobody trained, over the characters of `code_run`."""
    made = small_runs.on_uniform_graph(runs.load(code_run).restore())
    kernel = jax.random.normal(jax.random.key(1), made.model.params["head_kernel"].shape) / 4
    return dataclasses.replace(made, model=made.model.replace(params=made.model.params | {"head_kernel": kernel}))


@pytest.mark.slow
@pytest.mark.parametrize("sampler", sorted(n for n, one in samplers.SAMPLERS.items() if not one.traits.needs_mask))
def test_gaps_match_their_patterns(opened, sampler):
    corrector = {"tweedie": "gibbs", "euler": "forward_backward"}.get(sampler)
    extra = {} if corrector is None else {"corrector": corrector, "corrector_steps": 1}
    sampling = opened.run.sampling(sampler=sampler, num_steps=3, num_samples=8, top_p=0.9, **extra)
    template = templates.parse(opened.run, r"a = {4:(1|2)\n[ab] } = {1:[=]|2}{3}")
    drawn = generate.draw_samples(opened, template, sampling, seed=0)
    for one in drawn:
        assert re.fullmatch(r"a = (1|2)\n[ab]  = (=|2).{3}", one.text, re.DOTALL)
    assert len({one.text for one in drawn}) > 1


@pytest.mark.slow
def test_gaps_match_where_slots_are_refilled(opened):
    """Sequences are at steps of their own, and their last evaluations come in the middle of others."""
    written = [r"a = {4:(1|2)\n[ab] }", "{3:[12]+}{2}", "b{20}", r"a{6:( = 1\n)|( = 2)\n*}"] * 2
    sampling = opened.run.sampling(num_steps=3, num_samples=3, guidance=1.5)
    parsed = [templates.parse(opened.run, text) for text in written]
    drawn = {
        one.index: opened.run.tokenizer.decode(one.tokens) for one in refill.draw(opened, parsed, sampling, seed=0)
    }
    patterns_of = [r"a = (1|2)\n[ab] ", "[12]{3}..", "b.{20}", r"a(?=.{6}$)(( = 1\n)|( = 2)\n*)"] * 2
    assert len(drawn) == len(written)
    for index, text in drawn.items():
        assert re.fullmatch(patterns_of[index], text, re.DOTALL), text


@pytest.mark.slow
def test_guidance_sees_the_given_text_noised_and_counts_twice(opened):
    sampling = opened.run.sampling(num_steps=2, num_samples=8, guidance=3.0)
    assert generate.num_evaluations(opened.run, sampling) == 6
    seen = []
    apply = networks.apply

    def recorded(model, xt, sigma, *_):
        jax.debug.callback(lambda xt, sigma: seen.append((float(sigma[0]), np.asarray(xt))), xt, sigma)
        return apply(model, xt, sigma)

    template = templates.parse(opened.run, "a = 1{6}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "apply", recorded)
        trajectories.make_programs.cache_clear()
        drawn = generate.draw_samples(opened, template, sampling, seed=0)
        jax.effects_barrier()
    trajectories.make_programs.cache_clear()
    same = {}
    for sigma, xt in seen:
        same.setdefault(sigma, []).append(float((xt[:, :5] == template.tokens[:5]).mean()))
    # Nothing of the text is left at the start, and all of it at the end.
    first, _, last = (sorted(same[sigma]) for sigma in sorted(same, reverse=True))
    assert first[0] < 0.5 < first[1] == 1.0
    assert last == [1.0, 1.0]
    assert all(one.text.startswith("a = 1") for one in drawn)
