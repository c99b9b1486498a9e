"""References in float64: rate matrices, matrix exponentials, definitions, and exact distributions of samplers.

Nothing here uses the closed forms of `sedd_jax`; `exact_score_fn` and `dense_draws` are JAX, so that samplers can trace
them. `sample` and `take_steps` run the engine of sampling without a network.
"""

import collections
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.stats

from sedd_jax.diffusion import forward, graphs, noise_schedules
from sedd_jax.model import categoricals
from sedd_jax.reverse import samplers, steps, time_grids
from sedd_jax.sampling import trajectories

# (xt [B, L], sigma [B]) -> the score of every state, [B, L, V].
ScoreFn = Callable[[jax.Array, jax.Array], jax.Array]


def rate_matrix(graph: graphs.Graph) -> np.ndarray:
    """Q, [V, V]: Q[y, x] is the rate from x to y; columns sum to 0."""
    size = graph.num_states
    q = -np.eye(size)
    if graph.has_mask:
        q[graph.mask_id] += 1
    else:
        q += 1 / size
    return q


@functools.lru_cache(maxsize=1000)
def kernel(graph: graphs.Graph, sigma: float) -> np.ndarray:
    """exp(sigma Q), [V, V]: p(xt = row | x0 = column)."""
    found = scipy.linalg.expm(sigma * rate_matrix(graph))
    found.flags.writeable = False  # Others get the same array.
    return found


def ratios(graph: graphs.Graph, sigma: float, xt: int, x0: int) -> np.ndarray:
    """p(y | x0) / p(xt | x0) for every y, [V]; NaN where xt cannot come from x0."""
    column = kernel(graph, sigma)[:, x0]
    return column / column[xt] if column[xt] > 0 else np.full_like(column, np.nan)


def score_entropy(q_row: np.ndarray, log_score: np.ndarray, ratio: np.ndarray, xt: int) -> float:
    """Definition 3.1: sum over y != xt of Q(xt, y) [s_y - r_y log s_y + r_y (log r_y - 1)]."""
    terms = np.exp(log_score) - ratio * log_score + ratio * (np.log(np.where(ratio > 0, ratio, 1.0)) - 1)
    return float(np.delete(q_row * terms, xt).sum())


def states(graph: graphs.Graph, length: int) -> np.ndarray:
    """Every sequence, [V^L, L], in lexicographic order."""
    return np.array(list(itertools.product(range(graph.num_states), repeat=length)), np.int32)


def embed(graph: graphs.Graph, p0: np.ndarray) -> np.ndarray:
    """A distribution over clean sequences, [N, ..., N], as one over all states; the mask has to be the last."""
    return np.pad(p0, [(0, graph.num_states - size) for size in p0.shape])


def marginal(graph: graphs.Graph, p0: np.ndarray, sigma: float) -> np.ndarray:
    """Distribution of xt at noise sigma over all states, [V, ..., V]."""
    p = embed(graph, p0)
    for axis in range(p.ndim):
        p = np.moveaxis(np.tensordot(kernel(graph, sigma), p, (1, axis)), 0, axis)
    return p


def exact_scores(graph: graphs.Graph, p0: np.ndarray, sigma: float) -> np.ndarray:
    """p(x with x_l = y) / p(x) for every state x, [V^L, L, V], and 0 where p(x) = 0."""
    p = marginal(graph, p0, sigma)
    table = np.zeros((p.size, p.ndim, graph.num_states))
    for i, x in enumerate(states(graph, p.ndim)):
        for position in range(p.ndim):
            neighbours = p[(*x[:position], slice(None), *x[position + 1 :])]
            table[i, position] = np.divide(
                neighbours, p[tuple(x)], out=np.zeros_like(neighbours), where=p[tuple(x)] > 0
            )
    return table


def step_weights(
    graph: graphs.Graph, sampler: str, score: np.ndarray, xt: np.ndarray, delta_sigma: float, noise_rate: float
) -> np.ndarray:
    """Weights of one reverse step by its definition, [V^L, L, V]; `noise_rate` is dt dsigma_dt."""
    q, eye = rate_matrix(graph), np.eye(graph.num_states)
    if sampler == "tweedie":
        staggered = score @ scipy.linalg.expm(-delta_sigma * q).T
        return staggered * kernel(graph, delta_sigma)[xt]
    jumps = noise_rate * q[xt] * score * (1 - eye[xt])
    total = jumps.sum(-1, keepdims=True)
    if sampler == "euler":
        return jumps + eye[xt] * (1 - total)
    if sampler != "tau_leaping":
        raise KeyError(f"the step of {sampler} is not written here")
    stay = np.exp(-total)
    return eye[xt] * stay + (1 - stay) * np.divide(jumps, total, out=np.zeros_like(jumps), where=total > 0)


def step(weights: np.ndarray, p: np.ndarray) -> np.ndarray:
    """The distribution after every position draws from its weights; distributions are [V^L], weights [V^L, L, V]."""
    probs = np.maximum(weights, 0)
    probs = probs / probs.sum(-1, keepdims=True)
    joint = probs[:, 0]
    for position in range(1, probs.shape[1]):
        joint = (joint[:, :, None] * probs[:, position, None, :]).reshape(len(probs), -1)
    return p @ joint


def leap_time(graph: graphs.Graph, sigma: float) -> float:
    """The time in which second-order samplers take even leaps."""
    return np.log(-np.expm1(-sigma)) if graph.has_mask else sigma


def leap_rates(graph: graphs.Graph, p0: np.ndarray, sigma: float) -> np.ndarray:
    """Rates of the reverse process in `leap_time`, from each state at each position to each token, [V^L, L, V]."""
    xs, speed = states(graph, p0.ndim), np.expm1(sigma) if graph.has_mask else 1.0
    found = speed * rate_matrix(graph)[xs] * exact_scores(graph, p0, sigma)
    return np.where(xs[..., None] == np.arange(graph.num_states), 0.0, found)


def leap(graph: graphs.Graph, x: np.ndarray, integrated: np.ndarray) -> np.ndarray:
    """Distribution over all states after a leap from x with integrated rates, [L, V], that are frozen and cut at 0."""
    distribution = np.ones(1)
    for token, to in zip(x, np.maximum(integrated, 0), strict=True):
        to = np.where(np.arange(graph.num_states) == token, 0, to)
        own = to * -np.expm1(-to.sum()) / max(to.sum(), 1e-300)
        own[token] = np.exp(-to.sum())
        distribution = np.multiply.outer(distribution, own).ravel()
    return distribution


def trapezoidal_step(graph: graphs.Graph, p0: np.ndarray, p: np.ndarray, sigma: float, after: float) -> np.ndarray:
    """The distribution after a theta-trapezoidal step (theta 1/2) with the exact score, by definition; [V^L]."""
    xs, start = states(graph, p0.ndim), leap_time(graph, sigma)
    half = (start - leap_time(graph, after)) / 2
    middle = -np.log1p(-np.exp(start - half)) if graph.has_mask else start - half
    first, second, q = leap_rates(graph, p0, sigma), leap_rates(graph, p0, middle), np.zeros_like(p)
    for i in np.flatnonzero(p):
        between = leap(graph, xs[i], half * first[i])
        for j in np.flatnonzero(between):
            back = np.where((xs[i] == xs[j])[:, None], first[i], 0)
            q += p[i] * between[j] * leap(graph, xs[j], half * (2 * second[j] - back))
    return q


def _by_weights(sampler: str):
    def after(graph, noise, p0, p, t, end):
        sigma, delta_sigma = _sigma(noise, t), _sigma(noise, t) - _sigma(noise, end)
        rate = (t - end) * float(noise.dsigma_dt(jnp.float32(t)))
        xs = states(graph, p0.ndim)
        weights = step_weights(graph, sampler, exact_scores(graph, p0, sigma), xs, delta_sigma, rate)
        # What cannot be reached has no score, and no share in the distribution.
        return step(np.where(marginal(graph, p0, sigma).ravel()[:, None, None] > 0, weights, 1.0), p)

    return after


def _sigma(noise: noise_schedules.NoiseSchedule, t: float) -> float:
    return float(noise.sigma(jnp.float32(t)))


# Samplers that step through time -> the distribution p after a step from time t to `end` with the exact score:
# (graph, noise, p0, p, t, end) -> p. A new sampler adds its own, and the tests over the whole table take it.
STEP_DISTRIBUTIONS = {
    **{name: _by_weights(name) for name in ("tweedie", "euler", "tau_leaping")},
    "theta_trapezoidal": lambda graph, noise, p0, p, t, end: trapezoidal_step(
        graph, p0, p, _sigma(noise, t), _sigma(noise, end)
    ),
}


def entropy_bound(p0: np.ndarray, num_evaluations: int) -> np.ndarray:
    """Distribution over clean tokens of the sampler of that name with exact conditionals, by definition; like p0."""
    reached = {(None,) * p0.ndim: 1.0}
    for left in range(num_evaluations, 0, -1):
        before, reached = reached, collections.Counter()
        for known, probability in before.items():
            rest = p0[tuple(slice(None) if token is None else slice(token, token + 1) for token in known)]
            gaps = [axis for axis, token in enumerate(known) if token is None]
            own = {gap: rest.sum(tuple(set(range(p0.ndim)) - {gap})).ravel() / rest.sum() for gap in gaps}
            entropy = {gap: -(p[p > 0] * np.log(p[p > 0])).sum() for gap, p in own.items()}
            ranked = sorted(gaps, key=entropy.__getitem__)
            bound = lambda some, entropy=entropy: sum(entropy[gap] for gap in some[:-1])
            count = max(n for n in range(len(gaps) + 1) if n < 2 or left * bound(ranked[:n]) <= bound(ranked) + 1e-9)
            for tokens in itertools.product(range(len(p0)), repeat=count):
                filled = dict(zip(ranked, tokens, strict=False))
                to = tuple(filled.get(axis, token) for axis, token in enumerate(known))
                reached[to] += probability * np.prod([own[gap][token] for gap, token in filled.items()])
    found = np.zeros_like(p0)
    for tokens, probability in reached.items():
        found[tokens] = probability
    return found


def sampler_distribution(
    graph: graphs.Graph, noise: noise_schedules.NoiseSchedule, p0: np.ndarray, sampler: str, num_steps: int
) -> np.ndarray:
    """Exact distribution of `sample` with the exact score and a sampler of the table, [V^L]."""
    xs = states(graph, p0.ndim)
    if sampler == "first_hitting":
        assert num_steps + 1 >= p0.ndim  # With fewer evaluations it is not exact.
        return embed(graph, p0).ravel()
    if sampler == "entropy_bound":
        return embed(graph, entropy_bound(p0, num_steps + 1)).ravel()
    p = (xs == graph.mask_id).all(-1).astype(float) if graph.has_mask else np.full(len(xs), 1 / len(xs))
    dt = (1 - time_grids.T_END) / num_steps
    for t in 1 - dt * np.arange(num_steps):
        p = STEP_DISTRIBUTIONS[sampler](graph, noise, p0, p, t, t - dt)
    end = _sigma(noise, time_grids.T_END)
    weights = step_weights(graph, "tweedie", exact_scores(graph, p0, end), xs, end, 0.0)
    if graph.has_mask:
        weights[..., graph.mask_id] = 0
    return step(weights, p)


def exact_score_fn(graph: graphs.Graph, p0: np.ndarray) -> ScoreFn:
    """The exact score: (xt [B, L], sigma [B]) -> [B, L, V], one sigma for the whole batch."""
    clean = embed(graph, p0)
    limit = np.zeros(graph.num_states)
    if graph.has_mask:
        limit[graph.mask_id] = 1
    else:
        limit[:] = 1 / graph.num_states

    def score_fn(xt: jax.Array, sigma: jax.Array) -> jax.Array:
        stay = jnp.exp(-sigma[0])
        forward = stay * np.eye(graph.num_states) - jnp.expm1(-sigma[0]) * np.tile(limit[:, None], graph.num_states)
        p = jnp.asarray(clean, sigma.dtype)
        for axis in range(p.ndim):
            p = jnp.moveaxis(jnp.tensordot(forward.astype(p.dtype), p, (1, axis)), 0, axis)
        here = p[tuple(xt.T)]
        scores = []
        for position in range(p.ndim):
            others = [xt[:, i] for i in range(p.ndim) if i != position]
            neighbours = jnp.moveaxis(p, position, -1)[tuple(others)].reshape(-1, graph.num_states)
            scores.append(jnp.broadcast_to(neighbours, (len(xt), graph.num_states)) / here[:, None])
        return jnp.stack(scores, axis=1)

    return score_fn


def jump_weights(jump_fn: steps.JumpFn, score: jax.Array, xt: jax.Array) -> jax.Array:
    """The whole array of weights that a step gives a whole array of scores, [B, L, V]."""
    current = xt[..., None] == jnp.arange(score.shape[-1])[None, None]
    return jump_fn(jnp.where(current, 0.0, score).sum(-1)).weights(score, xt)


def dense_draws(score_fn: ScoreFn, graph: graphs.Graph, draw=categoricals.draw) -> steps.Draws:
    """What samplers ask for, from the score of every state: features are whole arrays of scores, [B, L, V].

    Args:
        score_fn: the network.
        graph: the graph of the forward process.
        draw: (key, weights [B, L, V]) -> tokens [B, L].
    """

    def evaluate(xt, sigma):
        return steps.Evaluation(score_fn(xt, sigma), sigma)

    def jump(key, evaluation, xt, is_movable, jump_fn):
        return jnp.where(is_movable, draw(key, jump_weights(jump_fn, evaluation.features, xt)), xt)

    def leap(key, rates, xt, is_movable):
        total = sum(one.slope[..., None] * one.evaluation.features for one in rates)
        current = xt[..., None] == jnp.arange(graph.num_states)[None, None]
        weights = jnp.where(current, 0.0, jnp.maximum(total, 0.0))
        away = weights.sum(-1, keepdims=True)
        weights = weights * -jnp.expm1(-away) / jnp.maximum(away, 1e-30)
        return jnp.where(is_movable, draw(key, jnp.where(current, jnp.exp(-away), weights)), xt)

    def entropy(evaluation, xt, is_needed):
        current = xt[..., None] == jnp.arange(graph.num_states)[None, None]
        weights = jnp.where(current, 0.0, evaluation.features)
        shares = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
        return jnp.where(is_needed, -jax.scipy.special.xlogy(shares, shares).sum(-1), 0.0)

    def margins(evaluation, xt, is_needed):
        best = jnp.sort(evaluation.features / evaluation.features.sum(-1, keepdims=True), axis=-1)
        return jnp.where(is_needed, best[..., -1] - best[..., -2], 0.0)

    return steps.Draws(evaluate, jump, leap, entropy, margins)


def sample(
    key: jax.Array,
    sampler: samplers.Sampler,
    draws: steps.Draws,
    process: forward.Process,
    given: steps.Given,
    num_steps: jax.Array | int,
) -> jax.Array:
    """Clean tokens of a whole batch, [B, L], drawn as `generate.draw_tokens` does, with the same use of keys.

    Args:
        key: of everything random.
        sampler: how the process is reversed.
        draws: the network; the same for every iteration.
        process: the forward process.
        given: known tokens.
        num_steps: steps before the last evaluation, of every sequence; may be traced.
    """
    key_limit, key_steps, key_last = jax.random.split(key, 3)
    rules, slots = _begin(key_limit, key_steps, sampler, process, given, num_steps)
    slots = trajectories.advance(key_steps, rules, lambda _: draws, slots, 0, num_steps * rules.repeats)[1]
    return sampler.finish(key_steps, key_last, draws, process, slots.batch)


def take_steps(
    key: jax.Array,
    sampler: samplers.Sampler,
    draws: steps.Draws,
    process: forward.Process,
    given: steps.Given,
    xt: jax.Array,
    start: jax.Array | int,
    stop: jax.Array | int,
    num_steps: jax.Array | int,
) -> jax.Array:
    """States after the steps `start` to `stop` of `num_steps`, corrector steps among them, from xt as it is.

    Args are those of `sample`; the key is that of all steps, and of what the sampler draws beforehand.
    """
    rules, slots = _begin(jax.random.key(0), key, sampler, process, given, num_steps)
    iteration = jnp.full_like(slots.batch.iteration, start * rules.repeats)
    slots = slots._replace(batch=slots.batch._replace(xt=xt, iteration=iteration))
    slots = trajectories.advance(key, rules, lambda _: draws, slots, start * rules.repeats, stop * rules.repeats)[1]
    return slots.batch.xt


def _begin(
    key_limit: jax.Array,
    key_plan: jax.Array,
    sampler: samplers.Sampler,
    process: forward.Process,
    given: steps.Given,
    num_steps: jax.Array | int,
) -> tuple[trajectories.Rules, trajectories.Slots]:
    """The engine before its first iteration, all sequences together, as `generate.rules_of` and `together` have it."""
    rules = trajectories.Rules(process=process, sampler=sampler, is_together=True)
    size, length = given.tokens.shape
    each = lambda value: jnp.full(size, value, jnp.int32)
    sequences = trajectories.Sequences(given, each(length), each(num_steps), jnp.ones(size, bool), None)
    return rules, trajectories.begin(key_limit, key_plan, rules, sequences)


def chi_square_p(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """p-value of counts under a distribution; outcomes expected fewer than five times are pooled."""
    expected = probabilities * counts.sum()
    assert counts[probabilities == 0].sum() == 0
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] < 5:  # Too little even together: into the largest.
        observed[observed[:-1].argmax()] += observed[-1]
        expected[expected[:-1].argmax()] += expected[-1]
        observed, expected = observed[:-1], expected[:-1]
    return float(scipy.stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue)
