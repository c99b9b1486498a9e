"""Controlled draws: against the distribution written out, over whole rows; what is forbidden is never drawn."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax.diffusion import graphs, scores
from sedd_jax.model import controls, networks, score_draws, score_heads, tiles
from sedd_jax.reverse import steps
from sedd_jax.runtime import sharding
from tests.support import oracles, slow

WIDTH, VOCAB, BATCH = 16, 300, 400
# Of BATCH draws: 3,200 at a position find weights that are wrong by a fifth (root mean square of 100 tokens).
CALLS = 8
GRAPHS = {
    "absorb": graphs.Absorbing(vocab_size=VOCAB, mask_id=103),
    "uniform": graphs.Uniform(vocab_size=VOCAB),
}
CONTROLS = {
    "cold": controls.Control(temperature=0.5),
    "hot": controls.Control(temperature=2.0),
    "nucleus": controls.Control(top_p=0.7),
    "both": controls.Control(temperature=0.8, top_p=0.5),
    "guided": controls.Control(guidance=2.5),
    "guided and cold": controls.Control(guidance=1.5, temperature=0.8),
}


@functools.cache
def problem(kind):
    """A network's head, features of three positions in each sequence, and states of them; the middle one stays."""
    graph = GRAPHS[kind]
    config = networks.NetworkConfig(
        num_states=graph.num_states, hidden_size=WIDTH, scale_by_sigma=graph.scales_by_sigma, dtype="float32"
    )
    normal = lambda *shape: np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)
    params = {
        "head_kernel": jnp.asarray(normal(WIDTH, config.padded_states) / 2),
        "head_bias": jnp.asarray(normal(config.padded_states) / 2),
    }
    features, without = (jnp.asarray(np.tile(one, (BATCH, 1, 1))) for one in normal(2, 1, 3, WIDTH))
    masked = 103 if graph.has_mask else 5
    xt = jnp.asarray(np.tile(np.int32([[masked, masked, masked if graph.has_mask else 7]]), (BATCH, 1)))
    return graph, networks.Model(config, params), features, without, xt


def nucleus(token, top_p):
    order = np.argsort(-token)
    kept = order[: int((np.cumsum(token[order]) < top_p * token.sum()).sum()) + 1]
    return np.where(np.isin(np.arange(len(token)), kept), token, 0.0)


def distribution_of(graph, jump_fn, score, xt, control, unguided_log_score, allowed):
    """By the definition: the step's chance to move, then the changed distribution of the token."""
    others = np.arange(graph.num_states) != xt
    total = score[others].sum()
    jump = jump_fn(jnp.full((1, 1), total, jnp.float32))
    offset = 0.0 if jump.offset is None else float(jump.offset[0, 0])
    step = np.where(others, np.maximum(float(jump.slope[0, 0]) * score + offset, 0), 0)
    stay = max(float(jump.stay[0, 0]), 0.0)
    token = step.copy()
    if control.guidance != 1:
        token = np.exp(unguided_log_score + control.guidance * (np.log(score) - unguided_log_score))
    token = np.where(others, token, 0.0) ** (1 / control.temperature)
    within = nucleus(token, control.top_p) * allowed
    token = within if within.any() else nucleus(token * allowed, control.top_p)
    token = token / token.sum()
    distribution = token * step.sum() / (step.sum() + stay)
    distribution[xt] = stay / (step.sum() + stay)
    return distribution


CASES = [
    ("absorb", "cold", False),
    ("absorb", "nucleus", False),
    ("absorb", "both", True),
    ("absorb", "guided", True),
    ("uniform", "hot", True),
    ("uniform", "nucleus", False),
]
QUICK = [("absorb", "both", True), ("uniform", "nucleus", False)]


@pytest.mark.parametrize(("kind", "name", "restricted"), slow.all_but(QUICK, CASES))
def test_draws_follow_the_distribution_written_out(kind, name, restricted, monkeypatch):
    monkeypatch.setattr(tiles, "chunk_size", lambda num_positions, most: 500)
    graph, model, features, without, xt = problem(kind)
    control, sigma = CONTROLS[name], jnp.full(BATCH, 0.7)
    monkeypatch.setattr(score_draws, "DRAWN_ROWS", {"cpu": 800})
    jump_fn = lambda total: scores.Jump(stay=total / 2, slope=1 + 0 * total)
    if kind == "uniform":
        jump_fn = lambda total: scores.Jump(stay=0.3 + 0 * total, slope=1e-3 + 0 * total, offset=-5e-4 + 0 * total)
    is_movable = graph.is_noise(xt).at[:, 1].set(False)
    class_of = jnp.arange(graph.num_states) % 3
    classes = jnp.tile(jnp.array([[1, 0, -1]]), (BATCH, 1))
    unguided = without if control.guidance != 1 else None
    options = (class_of, classes) if restricted else ()
    evaluation, how = steps.Evaluation(features, sigma), controls.choice(control, unguided, *options)
    drawn = jax.jit(lambda key: score_draws.draw(key, model, evaluation, xt, is_movable, jump_fn, how))
    tokens = np.concatenate([drawn(jax.random.key(seed)) for seed in range(CALLS)])
    log_scores = [np.float64(score_heads.log_score(model, f[:1], xt[:1], sigma[:1])[0]) for f in (features, without)]
    assert (tokens[:, 1] == xt[0, 1]).all()
    for position, only in ((0, 1), (2, -1)):
        allowed = np.asarray(class_of) == only if restricted and only >= 0 else np.ones(graph.num_states, bool)
        distribution = distribution_of(
            graph,
            lambda total: jax.tree.map(lambda x: x[:1, :1], jump_fn(jnp.broadcast_to(total, (1, 3)))),
            np.exp(log_scores[0][position]),
            int(xt[0, position]),
            control,
            log_scores[1][position],
            allowed,
        )
        assert 0.05 < distribution[int(xt[0, position])] < 0.95
        counts = np.bincount(tokens[:, position], minlength=graph.num_states)
        assert not counts[distribution == 0].any()
        assert oracles.chi_square_p(counts, distribution) > 1e-4


def test_a_pattern_chooses_among_the_likeliest_of_all_tokens():
    """And only where none of these is left, among the likeliest of its own."""
    distribution, is_possible = jnp.log(jnp.array([[0.5, 0.3, 0.14, 0.06]])), jnp.array([[True] * 4])
    found = lambda *allowed: np.exp(
        controls.reweigh(
            controls.Control(top_p=0.79), distribution, distribution, None, is_possible, jnp.array([allowed])
        )
    )
    np.testing.assert_allclose(found(False, True, True, False), [[0, 1, 0, 0]])
    np.testing.assert_allclose(found(True, True, True, True), [[1, 0.6, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(found(False, False, True, True), [[0, 0, 1, 0.06 / 0.14]], rtol=1e-6)


@pytest.mark.parametrize("control", [controls.Control(temperature=1e-6), controls.Control(top_p=1e-6)])
def test_at_the_least_that_is_allowed_only_the_likeliest_token_is_left(control):
    distribution = jnp.array([[-3000.0, -jnp.inf, -2.0, -2.5]])
    found = controls.reweigh(control, distribution, distribution, None, jnp.array([[True, True, True, True]]))
    np.testing.assert_array_equal(np.exp(found), [[0, 0, 1, 0]])


def test_what_is_allowed_is_drawn_however_unlikely_it_is(monkeypatch):
    monkeypatch.setattr(score_draws, "DRAWN_ROWS", {"cpu": 1200})
    graph, model, features, _, xt = problem("absorb")
    bias = np.array(model.params["head_bias"])
    bias[17] = -400.0
    model = model.replace(params=model.params | {"head_bias": jnp.asarray(bias)})
    classes, class_of = jnp.zeros_like(xt), jnp.asarray(np.int32(np.arange(graph.num_states) != 17))
    sigma, is_movable = jnp.full(BATCH, 0.7), jnp.ones(xt.shape, bool)
    for control in (controls.Control(), CONTROLS["both"]):
        evaluation, how = steps.Evaluation(features, sigma), controls.choice(control, None, class_of, classes)
        jump_fn = lambda total: graph.denoise_jump(total, xt, sigma)
        drawn = jax.jit(lambda key: score_draws.draw(key, model, evaluation, xt, is_movable, jump_fn, how))  # noqa: B023
        assert (np.asarray(drawn(jax.random.key(0))) == 17).all()


def test_shares_of_classes_are_those_of_their_tokens():
    graph, model, features, without, xt = problem("absorb")
    class_of, is_needed = jnp.arange(graph.num_states) % 5, jnp.ones(xt.shape, bool).at[:, 1].set(False)
    control = controls.Control(temperature=0.7, guidance=1.5)
    found = jax.jit(
        lambda: controls.class_log_weights(control, model, features, without, (class_of, 6), xt, is_needed)
    )()
    z = [np.float64(score_heads.logits(model, f[0])[:, : graph.num_states]) for f in (features, without)]
    for position in (0, 2):
        guided = np.exp((z[1] + 1.5 * (z[0] - z[1]))[position] / 0.7)
        guided[103] = 0
        shares = np.bincount(class_of, weights=guided, minlength=6) / guided.sum()
        np.testing.assert_allclose(np.exp(found[:, position, :5]), np.tile(shares[:5], (BATCH, 1)), rtol=1e-4)
    assert (found[:, 1] == 0).all()
    assert np.isfinite(found).all()  # The sixth class has no token.


@pytest.mark.slow
def test_a_mesh_changes_nothing(monkeypatch):
    monkeypatch.setattr(score_draws, "DRAWN_ROWS", {"cpu": 200})
    graph, model, features, without, xt = problem("absorb")
    sigma, class_of = jnp.full(BATCH, 0.7), jnp.arange(VOCAB + 1) % 3
    classes = jnp.tile(jnp.arange(3)[None], (BATCH, 1))

    def draw(model, features, without, xt, classes):
        jump_fn = lambda total: graph.tweedie_jump(total, xt, sigma / 2)
        movable = jnp.ones(xt.shape, bool)
        how = controls.choice(CONTROLS["guided"], without, class_of, classes)
        evaluation = steps.Evaluation(features, sigma)
        return score_draws.draw(jax.random.key(2), model, evaluation, xt, movable, jump_fn, how)

    arrays = (model, features, without, xt, classes)
    alone = jax.jit(draw)(*arrays)
    with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))):
        together = jax.jit(draw)(*arrays)
    np.testing.assert_array_equal(alone, together)
    assert (alone != xt).any()


def controlled_score(model, features, xt, sigma, control, unguided=None):
    """The score of the uniform graph from the changed distribution of the clean token given all others, [3, V]."""
    score_of = lambda features: np.exp(np.float64(score_heads.log_score(model, features[:1], xt[:1], sigma[:1])[0]))
    score = score_of(features)
    if unguided is not None:
        without = score_of(unguided)
        score = without * (score / without) ** control.guidance
    stays, found = np.exp(-float(sigma[0])), np.zeros(score.shape)
    for i, p in enumerate(score / score.sum(-1, keepdims=True)):
        r = np.maximum((p - (1 - stays) / VOCAB) / stays, 0)
        r = nucleus((r / r.sum()) ** (1 / control.temperature), control.top_p)
        mixed = VOCAB * stays * r / r.sum() + 1 - stays
        found[i] = mixed / mixed[int(xt[0, i])]
    return found


# Both controls together meet everything; each alone meets every other choice once.
OF_CLEAN_TOKEN = [("both", normalize, how) for normalize in (False, True) for how in ("draw", "leap")]
OF_CLEAN_TOKEN += [("cold", False, "draw"), ("nucleus", True, "leap")]
OF_CLEAN_TOKEN += [("guided", False, "draw"), ("guided and cold", True, "draw")]


@pytest.mark.parametrize(("name", "normalize", "how"), slow.all_but([("both", True, "draw")], OF_CLEAN_TOKEN))
def test_the_uniform_graph_changes_the_clean_token_and_mixes_the_noise_again(name, normalize, how, monkeypatch):
    monkeypatch.setattr(score_draws, "TILE_LOGITS", {"cpu": 384 * 500})  # Chunks that end inside the positions.
    _, model, one, other, xt = problem("uniform")
    model = model.replace(config=dataclasses.replace(model.config, normalize=normalize))
    sigmas, control = (jnp.full(BATCH, 0.9), jnp.full(BATCH, 0.4)), CONTROLS[name]
    is_movable, posterior = jnp.ones(xt.shape, bool).at[:, 1].set(False), controls.Posterior(control, model)
    unguided = None
    if control.guidance != 1:
        # Near the features with the known text, as for a real network: otherwise guidance leaves a token or two.
        unguided = one + other / 4
        posterior = posterior._replace(unguided=unguided)
    scored = [
        controlled_score(model, f, xt, sigma, control, unguided) for f, sigma in zip((one, other), sigmas, strict=True)
    ]
    evaluations = [steps.Evaluation(*pair) for pair in zip((one, other), sigmas, strict=True)]
    if how == "draw":
        jump_fn = lambda total: scores.Jump(stay=total / 2, slope=2 + 0 * total, offset=-0.1 + 0 * total)
        drawn = jax.jit(lambda key: posterior.draw(key, evaluations[0], xt, is_movable, jump_fn))
        weights = np.maximum(2 * scored[0] - 0.1, 0)
        stay = (scored[0].sum(-1) - 1) / 2
    else:
        slopes = (3e-3, -1e-3)
        rates = [steps.Rates(e, jnp.full(xt.shape, slope)) for e, slope in zip(evaluations, slopes, strict=True)]
        drawn = jax.jit(lambda key: posterior.leap(key, rates, xt, is_movable))
        weights = np.maximum(slopes[0] * scored[0] + slopes[1] * scored[1], 0)
        weights[np.arange(3), np.asarray(xt[0])] = 0
        total = weights.sum(-1, keepdims=True)
        weights, stay = weights * -np.expm1(-total) / total, np.exp(-total[:, 0])
    tokens = np.concatenate([drawn(jax.random.key(seed)) for seed in range(CALLS)])
    assert (tokens[:, 1] == xt[0, 1]).all()
    for position in (0, 2):
        distribution = weights[position].copy()
        distribution[xt[0, position]] = stay[position]
        distribution /= distribution.sum()
        assert 0.02 < distribution[xt[0, position]] < 0.98
        assert oracles.chi_square_p(np.bincount(tokens[:, position], minlength=VOCAB), distribution) > 1e-4


def test_a_clean_token_has_its_class_whatever_rounding_adds_to_other_weights():
    """A token outside the class would stay with the weight of a rounding error, here of much more."""
    _, model, features, _, xt = problem("uniform")
    class_of, classes = jnp.arange(VOCAB) % 3, jnp.tile(jnp.array([[1, 0, -1]]), (BATCH, 1))
    posterior = controls.Posterior(controls.Control(), model, class_of=class_of, classes=classes)
    is_clean = jnp.tile(jnp.arange(BATCH)[:, None] % 2 == 0, (1, 3))
    jump_fn = lambda total: scores.Jump(stay=1e4 * total, slope=1 + 0 * total, is_clean=is_clean)
    evaluation, is_movable = steps.Evaluation(features, jnp.full(BATCH, 0.7)), jnp.ones(xt.shape, bool)
    drawn = jax.jit(lambda key: posterior.draw(key, evaluation, xt, is_movable, jump_fn))(jax.random.key(0))
    assert (class_of[xt[:, :2]] != jnp.array([[1, 0]])).all()
    assert (class_of[drawn[::2, :2]] == jnp.array([[1, 0]])).all()
    assert (np.asarray(drawn)[1::2] == np.asarray(xt)[1::2]).mean() > 0.99


def test_without_control_the_uniform_graph_mixes_to_the_score_itself():
    """Exact scores: less noise and noise again are nothing."""
    sigma, xs = 0.8, oracles.states(graphs.Uniform(vocab_size=4), 2)
    p0 = np.random.default_rng(0).dirichlet(np.full(16, 0.4)).reshape(4, 4)
    exact = oracles.exact_scores(graphs.Uniform(vocab_size=4), p0, sigma)[:, 0]
    config = networks.NetworkConfig(num_states=4, hidden_size=16, scale_by_sigma=False, dtype="float32")
    kernel = jnp.zeros((16, config.padded_states)).at[:, :4].set(jnp.log(exact))
    model = networks.Model(config, {"head_kernel": kernel, "head_bias": jnp.zeros(config.padded_states)})
    posterior, xt = controls.Posterior(controls.Control(), model), jnp.asarray(xs[:, :1])
    evaluation = steps.Evaluation(jnp.eye(16)[:, None], jnp.full(16, sigma))
    weights, noise = posterior._scores([evaluation], xt)
    total = posterior._sum(weights, noise, jnp.ones(xt.shape, bool))
    np.testing.assert_allclose(total[:, 0], exact.sum(-1) - 1, rtol=1e-5)
