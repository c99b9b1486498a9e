"""Gaps with patterns, and other controls, from the template to the text."""

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
from sedd_jax.sampling import constraints, draws, generate, patterns, templates, trajectories
from tests.support import oracles, slow

LENGTH, DRAWS = 4, 4000


@pytest.fixture(scope="module")
def product(request):
    """A network whose features do not depend on its input, so that positions are independent."""
    tokenizer = alphabets.Characters(alphabet="abc")
    graph = graphs.Absorbing(vocab_size=3, mask_id=3)
    config = networks.NetworkConfig(num_states=4, hidden_size=8, dtype="float32")
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "head_kernel": jax.random.normal(keys[0], (8, config.padded_states)),
        "head_bias": jnp.zeros(config.padded_states),
    }
    return tokenizer, graph, config, params, jax.random.normal(keys[1], (1, LENGTH, 8))


@pytest.mark.parametrize(("known", "is_drawn"), slow.all_but([("b", True)], [("", False), ("b", False), ("b", True)]))
def test_what_is_drawn_at_once_has_the_joint_distribution_of_texts_that_match(product, known, is_drawn, monkeypatch):
    """All gaps are filled in one evaluation: from the product of the positions, given that the text matches."""
    tokenizer, graph, config, params, features = product
    monkeypatch.setattr(networks, "apply", lambda model, xt, sigma, *_: jnp.broadcast_to(features, (*xt.shape, 8)))
    pattern = "a+b|(b|c){2}a*|cab.*"
    automaton, initial = patterns.compile([pattern], tokenizer, graph)
    places = patterns.place([patterns.Gap(0, LENGTH, pattern)], LENGTH, automaton, initial)
    batch = jax.tree.map(lambda x: np.tile(x[None], (DRAWS, 1)), places)
    is_given = jnp.tile(jnp.arange(LENGTH)[None] < len(known), (DRAWS, 1))
    xt = steps.Given(jnp.full((DRAWS, LENGTH), 1), is_given).clamp(jnp.full((DRAWS, LENGTH), 3))
    given = steps.Given(xt, is_given & (not is_drawn))
    own = draws.NetworkDraws(
        model=networks.Model(config, params),
        graph=graph,
        given=given,
        patterns=constraints.Patterns(automaton, batch),
        control=controls.Control(temperature=0.8),
        draw="precise",
    )
    sigma = jnp.full(DRAWS, 0.5)
    jump_fn = lambda total: graph.denoise_jump(total, xt, sigma)
    drawn = jax.jit(lambda key: own.draws.move(key, xt, sigma, graph.is_noise(xt), jump_fn))(jax.random.key(1))
    z = np.float64(score_heads.logits(networks.Model(config, params), features))[0, :, :3] / 0.8
    texts = ["".join(text) for text in itertools.product("abc", repeat=LENGTH)]
    distribution = np.array(
        [
            np.exp(z[np.arange(LENGTH), ["abc".index(c) for c in text]].sum())
            if re.fullmatch(pattern, text) and text.startswith(known)
            else 0.0
            for text in texts
        ]
    )
    counts = np.bincount(np.asarray(drawn) @ [27, 9, 3, 1], minlength=81)
    assert (distribution > 0).sum() > 1
    assert not counts[distribution == 0].any()
    assert oracles.chi_square_p(counts, distribution / distribution.sum()) > 1e-4


@pytest.mark.parametrize("what", ["draw", "leap"])
def test_a_controlled_run_of_the_uniform_graph_changes_the_clean_token(what):
    graph, control = graphs.Uniform(vocab_size=3), controls.Control(temperature=0.5)
    config = networks.NetworkConfig(num_states=3, hidden_size=8, scale_by_sigma=False, dtype="float32")
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"head_kernel": normal(8, config.padded_states), "head_bias": jnp.zeros(config.padded_states)}
    features, xt = normal(50, LENGTH, 8), jnp.asarray(rng.integers(3, size=(50, LENGTH), dtype=np.int32))
    model, sigma, is_movable = networks.Model(config, params), jnp.full(50, 0.7), jnp.ones(xt.shape, bool)
    given, evaluation = steps.nothing_given(xt.shape), steps.Evaluation(features, sigma)
    own = draws.NetworkDraws(model, graph, given, None, control, "precise").draws
    posterior = controls.Posterior(control, model)
    if what == "draw":
        jump_fn = lambda total: graph.tweedie_jump(total, xt, sigma)
        both = [lambda key, fn=fn: fn(key, evaluation, xt, is_movable, jump_fn) for fn in (own.draw_fn, posterior.draw)]
    else:
        rates = [steps.Rates(evaluation, jnp.full(xt.shape, 0.2))]
        both = [lambda key, fn=fn: fn(key, rates, xt, is_movable) for fn in (own.leap_fn, posterior.leap)]
    drawn, expected = (np.asarray(jax.jit(fn)(jax.random.key(5))) for fn in both)
    np.testing.assert_array_equal(drawn, expected)
    assert (drawn != np.asarray(xt)).any()


@pytest.mark.slow
@pytest.mark.parametrize("sampler", sorted(samplers.SAMPLERS))
def test_gaps_of_a_run_match_their_patterns(code_run, sampler):
    run = runs.load(code_run)
    opened = run.restore()
    corrects = sampler in ("tweedie", "first_hitting")  # Correctors, which take long to compile, know no sampler.
    sampling = run.sampling(sampler=sampler, num_steps=3, num_samples=8, corrector_steps=int(corrects), top_p=0.9)
    template = templates.parse(run, r"a = {4:(1|2)\n[ab] } = {1:[=]|2}{3}")
    with opened.on_devices():
        drawn = generate.draw_samples(opened, template, sampling, seed=0)
    for one in drawn:
        assert re.fullmatch(r"a = (1|2)\n[ab]  = (=|2).{3}", one.text, re.DOTALL)
        assert one.annealing == "top_p=0.9"
    assert len({one.text for one in drawn}) > 1


@pytest.mark.slow
def test_guidance_sees_the_sequence_without_what_is_given_and_counts_twice(code_run):
    run = runs.load(code_run)
    opened = run.restore()
    sampling = run.sampling(num_steps=2, num_samples=8)
    guided = dataclasses.replace(sampling, guidance=3.0)
    assert generate.num_evaluations(run, guided) == 2 * generate.num_evaluations(run, sampling) == 6
    seen = []
    apply = networks.apply

    def recorded(model, xt, sigma, *_):
        jax.debug.callback(lambda xt: seen.append(np.asarray(xt)), xt)
        return apply(model, xt, sigma)

    template = templates.parse(run, "a = 1{6}")
    with pytest.MonkeyPatch.context() as patch, opened.on_devices():
        patch.setattr(networks, "apply", recorded)
        trajectories.make_programs.cache_clear()
        drawn = generate.draw_samples(opened, template, guided, seed=0)
        jax.effects_barrier()
    trajectories.make_programs.cache_clear()
    known = template.tokens[:5]
    with_given = [(xt[:, :5] == known).all() for xt in seen]
    without = [(xt[:, :5] == run.graph.mask_id).all() for xt in seen]
    assert sum(with_given) == sum(without) == 3
    assert all(one.text.startswith("a = 1") for one in drawn)


def test_what_cannot_be_asked_is_said(code_run, judge_run):
    run = runs.load(code_run)
    for template, message in (
        ("{3:[a}", r"\[a"),
        ("{3:1{2}}", r"no text of 3 tokens matches, texts of 2 do"),
    ):
        with pytest.raises(ValueError, match=message):
            templates.compile_patterns(run, [templates.parse(run, template)])
    with pytest.raises(ValueError, match=r"has a pattern, which takes a diffusion run, not config\.graph\.name=auto"):
        templates.compile_patterns(runs.load(judge_run), [templates.parse(runs.load(judge_run), "a{3:1+}")])
    for wrong, message in (
        ({"temperature": 0.0}, r"config\.sampling\.temperature=0\.0 must be from 1e-6 to 1e6"),
        ({"temperature": 1e39}, r"config\.sampling\.temperature=1e\+39 must be from 1e-6 to 1e6"),
        ({"guidance": 1e39}, r"config\.sampling\.guidance=1e\+39 must be above 0, and at most 1e6"),
        ({"top_p": 1.5}, r"config\.sampling\.top_p=1\.5 must be from 1e-6 to 1"),
        ({"guidance": 0.0}, r"config\.sampling\.guidance=0\.0 must be above 0"),
        ({"top_p": 0.5, "draw": "published"}, r"config\.sampling\.top_p=0\.5 is a control of precise draws"),
        ({"guidance": 2.0, "sampler": "theta_trapezoidal"}, r"takes a diffusion run.*sampler=theta_trapezoidal"),
    ):
        with pytest.raises(ValueError, match=message):
            run.sampling(**wrong)
    with pytest.raises(ValueError, match=r"config\.sampling\.guidance=2\.0 takes a diffusion run"):
        runs.load(judge_run).sampling(guidance=2.0)
