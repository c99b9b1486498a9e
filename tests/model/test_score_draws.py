"""Draws by blocks of states follow the weights of the whole array, for every step of every graph."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax.diffusion import forward, graphs, noise_schedules
from sedd_jax.model import networks, score_draws, score_heads, tiles
from sedd_jax.reverse import steps
from sedd_jax.runtime import sharding
from tests.support import oracles, slow

WIDTH, VOCAB, BATCH = 16, 300, 400
JUMPS = {"euler": steps.euler, "tau_leaping": steps.tau_leaping, "tweedie": steps.tweedie}
NOISE = noise_schedules.Geometric(sigma_max=4.0)
GRAPHS = {
    "absorb": graphs.Absorbing(vocab_size=VOCAB, mask_id=VOCAB),
    "normalised": graphs.Absorbing(vocab_size=VOCAB, mask_id=VOCAB),
    "mask inside": graphs.Absorbing(vocab_size=VOCAB, mask_id=103),
    "uniform": graphs.Uniform(vocab_size=VOCAB),
    "uniform, normalised": graphs.Uniform(vocab_size=VOCAB),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Three blocks, the last of which reaches back, and chunks that end inside the positions."""
    monkeypatch.setattr(score_draws, "BLOCK_STATES", {"cpu": 160})
    monkeypatch.setattr(tiles, "chunk_size", lambda num_positions, most: 500)


def problem(graph: graphs.Graph, normalized: bool = False):
    """A network's head, features that are the same for every sequence, and tokens."""
    config = networks.NetworkConfig(
        num_states=graph.num_states,
        hidden_size=WIDTH,
        scale_by_sigma=graph.scales_by_sigma,
        normalize=normalized,
        dtype="float32",
    )
    normal = lambda *shape: np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)
    params = {
        "head_kernel": jnp.asarray(normal(WIDTH, config.padded_states) / 2),
        "head_bias": jnp.asarray(normal(config.padded_states) / 2),
    }
    features = jnp.asarray(np.tile(normal(1, 3, WIDTH), (BATCH, 1, 1)))
    masked = graph.mask_id if graph.has_mask else 5
    xt = jnp.asarray(np.tile(np.int32([[masked, masked, 7]]), (BATCH, 1)))
    return networks.Model(config, params), features, xt


QUICK = [(name, jump, "precise") for name in ("absorb", "uniform, normalised") for jump in ("euler", "denoise")]
# How noise is drawn knows neither graph nor step but by their weights: the published noise meets each of them once.
PUBLISHED = [
    ("absorb", "tweedie", "published"),
    ("normalised", "denoise", "published"),
    ("mask inside", "euler", "published"),
    ("uniform", "tau_leaping", "published"),
    ("uniform, normalised", "tweedie", "published"),
]
CASES = [*((name, jump, "precise") for name in sorted(GRAPHS) for jump in (*sorted(JUMPS), "denoise")), *PUBLISHED]


@pytest.mark.parametrize(("name", "jump", "draw"), slow.all_but(QUICK, CASES))
def test_draws_follow_the_weights_of_the_whole_array(name, jump, draw):
    graph = GRAPHS[name]
    model, features, xt = problem(graph, "normalised" in name)
    if "normalised" in name:
        model.params["head_bias"] += 120.0  # whose exponential float32 does not hold
    t = jnp.full(BATCH, 0.8)
    sigma = NOISE.sigma(t)
    is_movable = np.array(graph.is_noise(xt))
    is_movable[:, 1] = False
    is_movable = jnp.asarray(is_movable)

    def jump_fn(sigma, xt, t, total):
        if jump == "denoise":
            return graph.denoise_jump(total, xt, sigma)
        return JUMPS[jump](forward.Process(graph, NOISE), total, xt, t, jnp.full_like(t, 0.2))

    @jax.jit
    def drawn(key):
        jump = functools.partial(jump_fn, sigma, xt, t)
        return score_draws.DRAWS[draw](key, model, steps.Evaluation(features, sigma), xt, is_movable, jump)

    # 4,000 draws at a position find weights that are wrong by a fifth (root mean square of 100 tokens).
    tokens = np.concatenate([drawn(jax.random.key(seed)) for seed in range(10)])
    score = jnp.exp(score_heads.log_score(model, features[:1], xt[:1], sigma[:1]))
    weights = oracles.jump_weights(functools.partial(jump_fn, sigma[:1], xt[:1], t[:1]), score, xt[:1])
    distributions = np.maximum(np.float64(weights[0]), 0)
    for position, movable in enumerate(is_movable[0]):
        if not movable:
            assert (tokens[:, position] == xt[0, position]).all()
            continue
        distribution = distributions[position] / distributions[position].sum()
        assert oracles.chi_square_p(np.bincount(tokens[:, position], minlength=graph.num_states), distribution) > 1e-4


@pytest.mark.slow
def test_a_block_and_its_state_are_right_at_tiny_odds():
    """States with odds of 2e-5 in a block of their own: both draws are as precise as `categoricals.draw`."""
    graph = GRAPHS["absorb"]
    model, features, xt = problem(graph)
    logits = jnp.full(model.config.padded_states, -jnp.inf).at[0].set(0.0).at[170:300].set(jnp.log(2e-5))
    model = model.replace(params={"head_kernel": jnp.zeros_like(model.params["head_kernel"]), "head_bias": logits})
    evaluation = steps.Evaluation(features, jnp.full(BATCH, jnp.log1p(1 / VOCAB)))

    @jax.jit
    def rare(key):
        jump = lambda total: graph.denoise_jump(total, xt, evaluation.sigma)
        tokens = score_draws.draw(key, model, evaluation, xt, graph.is_noise(xt), jump)
        return ((tokens[:, :2] >= 170) & (tokens[:, :2] < 300)).sum()

    count = int(jax.jit(lambda keys: jax.lax.map(rare, keys).sum())(jax.random.split(jax.random.key(2), 100)))
    expected = 2 * BATCH * 100 * 130 * 2e-5
    assert abs(count - expected) < 5 * expected**0.5


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("batch", [BATCH, 3], ids=["divided", "whole"])
def test_draws_are_the_same_on_every_mesh(shape, batch):
    process = forward.Process(GRAPHS["absorb"], NOISE)
    model, features, xt = problem(process.graph)
    features, xt, t = features[:batch], xt[:batch], jnp.full(batch, 0.5)

    @jax.jit
    def drawn(model, features, xt):
        jump = lambda total: steps.tweedie(process, total, xt, t, jnp.full_like(t, 0.2))
        evaluation = steps.Evaluation(features, NOISE.sigma(t))
        return score_draws.draw(jax.random.key(4), model, evaluation, xt, process.graph.is_noise(xt), jump)

    alone = drawn(model, features, xt)
    assert (alone != xt).any()
    with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]))):
        np.testing.assert_array_equal(drawn(model, features, xt), alone)


@pytest.mark.parametrize("name", ["absorb", "mask inside"])
def test_entropies_are_those_of_the_whole_array(name):
    """Of a token that is not the mask; logits are large, and of some positions far apart or all the bias."""
    graph = GRAPHS[name]
    model, features, xt = problem(graph, normalized=True)
    model.params["head_bias"] += 120.0
    features = (features * jnp.linspace(0, 3, BATCH)[:, None, None]).at[0, 1].set(1e4)
    is_needed = graph.is_noise(xt).at[2].set(False)
    z = np.array(score_heads.logits(model, features)[..., : graph.num_states], float)
    z[..., graph.mask_id] = -np.inf
    shares = np.exp(z - z.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    expected = -np.where(shares > 0, shares * np.log(np.where(shares > 0, shares, 1)), 0).sum(-1)
    evaluation = steps.Evaluation(features, jnp.full(BATCH, 0.7))
    found = np.asarray(jax.jit(lambda: score_draws.entropies(model, evaluation, xt, is_needed))())
    np.testing.assert_allclose(found, np.where(is_needed, expected, 0.0), rtol=1e-4, atol=1e-5)
    assert expected[:, 0].min() < 1.5
    assert expected[:, 0].max() > 5.0


def test_no_array_over_the_vocabulary():
    """Memory of a step does not grow with the vocabulary, but for the head itself."""

    def temporary_bytes(num_states: int) -> int:
        config = networks.NetworkConfig(num_states=num_states, hidden_size=WIDTH, dtype="float32")
        process = forward.Process(graphs.Absorbing(vocab_size=num_states - 1, mask_id=num_states - 1), NOISE)
        shapes = [(WIDTH, config.padded_states), (config.padded_states,), (2, 256, WIDTH)]
        kernel, bias, features = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)

        def step(kernel, bias, features, xt, t):
            jump = lambda total: steps.tweedie(process, total, xt, t, jnp.full_like(t, 0.2))
            model = networks.Model(config, {"head_kernel": kernel, "head_bias": bias})
            evaluation, is_movable = steps.Evaluation(features, NOISE.sigma(t)), process.graph.is_noise(xt)
            return score_draws.draw(jax.random.key(0), model, evaluation, xt, is_movable, jump)

        tokens, times = jax.ShapeDtypeStruct((2, 256), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.float32)
        compiled = jax.jit(step).lower(kernel, bias, features, tokens, times).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporary_bytes(2_000), temporary_bytes(64_000)
    # What grows is the sum of each block, 160 states here.
    assert large - small < 2 * 256 * 62_000 * 4 / 10
