"""Bounds on the likelihood of a continuation given its context: the context is never noised, only the rest counts.

Absorbing graph: filling n masks one by one, in random order, has the likelihood of each token when it is filled. So
with k uniform in 1..n and k of the n tokens masked at random,

    -log p(continuation | context) <= E[n / k sum over the k masks of -log p(token | what is not masked)],

an equality where the network knows the true conditionals. It is the integral of the cross-entropy bound over time (Lou
et al. 2023, equation 10; Ou et al. 2024, arXiv 2406.03736), with the number of masks in place of the time: no draw is
without a mask, and the value hardly depends on k. What follows the continuation stays masked: it is what would be
filled last, and what may follow sums to 1, so nothing is assumed about it. Other graphs have no state for "not known",
so the sequence ends with the continuation; the bound is then the integral over time with the terms at its ends.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from sedd_jax import runs
from sedd_jax.bounds import likelihoods
from sedd_jax.data import tokenizers
from sedd_jax.diffusion import forward, losses, time_laws
from sedd_jax.model import autoregression, objectives
from sedd_jax.runtime import errors, sharding

DRAWS = 8  # in a pass: spread evenly over the number of masks, or time
_LEAST_PASSES = 8
_ERRORS = 3  # standard errors that decide


class Part(NamedTuple):
    """Tokens of which only the last ones count.

    Attributes:
        tokens: context and continuation.
        start: index of the first token that counts.
    """

    tokens: Int[np.ndarray, "n"]
    start: int

    @property
    def num_tokens(self) -> int:
        """Number of tokens that count."""
        return len(self.tokens) - self.start


# (key, a part, shares of the interval of times or masks [B]) -> bounds in nats [B].
ValuesFn = Callable[[Key[Array, ""], Part, Float[np.ndarray, "B"]], Float[Array, "B"]]


def encode(
    tokenizer: tokenizers.Tokenizer, length: int, context: str, continuations: Sequence[str]
) -> tuple[list[Part], int]:
    """The tokens of a context with each of its continuations, and how many tokens of the context were cut off.

    An end of text, where the tokenizer has one, comes before the context: in packed text a document follows it. A
    context that is too long for the longest continuation loses its start. The text is tokenized as a whole where the
    tokens of the context are the first of the whole. Spaces at the end of a context may count to the continuation for
    that. Where neither holds, the two are tokenized apart.

    Raises:
        errors.UserError: where a continuation has no tokens, or does not fit the model's length.
    """
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    pairs = [_split(tokenizer, context, continuation) for continuation in continuations]
    longest = max(len(counted) for _, counted in pairs)
    if longest > length or not all(len(counted) for _, counted in pairs):
        problem = f"has {longest} tokens, and the run's sequences {length}" if longest > length else "has no tokens"
        raise errors.UserError(f"a continuation {problem}", remedy="give another")
    given = [np.array([*end, *known], np.int32) for known, _ in pairs]
    room = length - longest
    parts = [
        Part(np.concatenate([known[max(0, len(known) - room) :], counted]), min(len(known), room))
        for known, (_, counted) in zip(given, pairs, strict=True)
    ]
    return parts, max(0, max(map(len, given)) - room)


def _split(
    tokenizer: tokenizers.Tokenizer, context: str, continuation: str
) -> tuple[Int[np.ndarray, "_"], Int[np.ndarray, "_"]]:
    whole = tokenizer.encode(context + continuation)
    for text in (context, context.rstrip()):
        known = tokenizer.encode(text)
        if np.array_equal(whole[: len(known)], known):
            return known.astype(np.int32), whole[len(known) :].astype(np.int32)
    return tokenizer.encode(context).astype(np.int32), tokenizer.encode(continuation).astype(np.int32)


def make_values_fn(opened: runs.OpenRun) -> ValuesFn:
    """A compiled function that bounds -log p of the tokens of a part that count, given those before."""
    run, length = opened.run, opened.run.config.data.length

    def values(model, key, tokens, start, stop, u, width):
        x0 = jnp.broadcast_to(tokens, (len(u), length))
        if run.is_autoregressive:
            each = autoregression.log_likelihood(model, x0, run.graph)
            found = -jnp.where(_is_counted(x0, start, stop), each, 0.0).sum(-1)
        else:
            summary_fn = objectives.summary_fn(model, run.process)
            found = sequence_bounds(key, summary_fn, run.process, x0, start, stop, u, width=width)
        return sharding.replicate(found)

    compiled = jax.jit(values, static_argnums=6)

    def of_part(key, part, u):
        tokens = np.zeros(length, np.int32)
        tokens[: len(part.tokens)] = part.tokens
        width = length if run.graph.has_mask else len(part.tokens)
        with opened.on_devices():
            return compiled(opened.model, key, tokens, part.start, len(part.tokens), u, width)

    return of_part


def sequence_bounds(
    key: Key[Array, ""],
    summary_fn: losses.SummaryFn,
    process: forward.Process,
    x0: Int[Array, "B L"],
    start: Int[Array, ""] | int,
    stop: Int[Array, ""] | int,
    u: Float[Array, "B"],
    *,
    width: int,
) -> Float[Array, "B"]:
    """Bounds on -log p(x0 from start to stop | x0 before start) in nats, each from one draw.

    Args:
        key: key of the noise. What it draws at a position is the same for any x0, start and stop.
        summary_fn: the network, see `losses.SummaryFn`.
        process: the forward process.
        x0: tokens; what follows `stop` may be anything.
        start: index of the first token that counts.
        stop: index after the last one.
        u: uniform in [0, 1): shares of the interval of numbers of masks, or of times.
        width: tokens that the network reads. Those after `stop` are masked; a graph without a mask must have none.
    """
    graph, noise = process.graph, process.noise
    counted = _is_counted(x0, start, stop)
    if not graph.has_mask:
        return _over_time(key, summary_fn, process, x0, counted, u, width)
    assert graph.mask_id is not None
    num_counted = stop - start
    num_masks = jnp.minimum(1 + jnp.floor(u * num_counted).astype(jnp.int32), num_counted)
    # The k positions of lowest priority are masked. The priority of the last is distributed as the share of masks at
    # the moment at which one of k masks is filled, so it is the noise that the network is told.
    priority = jnp.where(counted, jax.random.uniform(key, x0.shape), 2.0)
    share = jnp.take_along_axis(jnp.sort(priority, axis=1), num_masks[:, None] - 1, axis=1)
    masked = priority <= share
    xt = jnp.where(masked | (jnp.arange(x0.shape[1])[None] >= stop), graph.mask_id, x0)
    least, most = noise.sigma(jnp.float32(time_laws.T_MIN)), noise.sigma(jnp.float32(1.0))
    sigma = jnp.clip(-jnp.log1p(-share[:, 0]), least, most)
    xt, x0, masked = xt[:, :width], x0[:, :width], masked[:, :width]
    surprise = graph.reconstruction(summary_fn(xt, x0, sigma), sigma, xt, x0)
    return jnp.where(masked, surprise, 0.0).sum(-1) * num_counted / num_masks


def _over_time(
    key: Key[Array, ""],
    summary_fn: losses.SummaryFn,
    process: forward.Process,
    x0: Int[Array, "B L"],
    counted: Bool[Array, "B L"],
    u: Float[Array, "B"],
    width: int,
) -> Float[Array, "B"]:
    """The integral over times, prior and reconstruction terms of the tokens that count."""
    graph, noise = process.graph, process.noise
    key_t, key_end = jax.random.split(key)

    def at(key, t):
        sigma = noise.sigma(t)
        xt = jnp.where(counted, graph.sample_transition(key, x0, sigma), x0)[:, :width]
        return sigma, xt, x0[:, :width], summary_fn(xt, x0[:, :width], sigma)

    t = time_laws.T_MIN + (1 - time_laws.T_MIN) * u
    sigma, xt, clean, summary = at(key_t, t)
    rate = graph.cross_entropy(summary, sigma, xt, clean) * noise.dsigma_dt(t)[:, None] * (1 - time_laws.T_MIN)
    sigma, xt, clean, summary = at(key_end, jnp.full_like(t, time_laws.T_MIN))
    ends = graph.reconstruction(summary, sigma, xt, clean) + graph.limit_divergence(noise.sigma(jnp.float32(1.0)))
    return jnp.where(counted[:, :width], rate + ends, 0.0).sum(-1)


def _is_counted(x0: Int[Array, "B L"], start: Int[Array, ""] | int, stop: Int[Array, ""] | int) -> Bool[Array, "B L"]:
    place = jnp.arange(x0.shape[1])[None]
    return jnp.broadcast_to((place >= start) & (place < stop), x0.shape)


def passes(
    values_fn: ValuesFn, parts: Sequence[Part], *, batch_size: int, seed: tuple[int, ...]
) -> Iterator[Float[np.ndarray, "K C"]]:
    """Bounds on -log p of each part in nats: means of K passes of `DRAWS` draws at a time, without end.

    All parts share times, masks and noise.

    Args:
        values_fn: of `make_values_fn`.
        parts: tokens, at most as many in each as the model's length.
        batch_size: sequences at once, rounded up to whole passes that fill the devices.
        seed: of everything random.
    """
    multiple = math.lcm(DRAWS, sharding.num_batch_devices())
    shape = (-(-batch_size // multiple) * multiple // DRAWS, DRAWS)
    for number in itertools.count():
        generator = np.random.default_rng((*seed, number))
        key_seed = int(generator.integers(2**31))
        u = (np.argsort(generator.random(shape), axis=1) + generator.random((shape[0], 1))) / DRAWS
        values = [_values(values_fn, key_seed, part, u.ravel()) for part in parts]
        yield np.stack(values, axis=1).reshape(*shape, len(parts)).mean(axis=1)


def _values(values_fn: ValuesFn, key_seed: int, part: Part, u: Float[np.ndarray, "B"]) -> Float[np.ndarray, "B"]:
    # Each part has the same key, on purpose: the parts share what is drawn.
    key = jax.random.key(key_seed)
    return np.asarray(jax.device_get(values_fn(key, part, u.astype(np.float32))), np.float64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """When draws stop.

    Attributes:
        num_times: draws for each part at most, rounded up to whole calls; at least 64, for a standard error.
        target_stderr: standard error of a single part's bound at which to stop, in nats per token that counts.
        batch_size: sequences at once.
        seed: seed of masks, times and noise.
    """

    num_times: int = 1024
    target_stderr: float = 0.01
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self):
        likelihoods.check(self.num_times, self.target_stderr, self.batch_size)


BUDGET = Budget()


class Found(NamedTuple):
    """Bounds of an item's parts, and how far the best is ahead.

    Attributes:
        nats: bound on -log p of each part.
        stderrs: their standard errors.
        num_times: draws for each part; 0 where values are exact.
        best: index of the lowest bound.
        lead: how much lower it is than the second lowest; None for a single part.
        lead_stderr: standard error of this difference, of draws that both share; None likewise.
        is_decided: whether draws ended before the budget.
    """

    nats: list[float]
    stderrs: list[float]
    num_times: int
    best: int
    lead: float | None
    lead_stderr: float | None
    is_decided: bool


def estimate(
    values_fn: ValuesFn, parts: Sequence[Part], budget: Budget, number: int = 0, *, is_exact: bool = False
) -> Found:
    """Bounds of parts, drawn until their ranking is decided, a single one's error small enough, or the budget spent.

    The ranking is decided where every difference to the best part is above three standard errors, which are widened for
    few passes as an interval of Student's t is.

    Args:
        values_fn: of `make_values_fn`.
        parts: continuations of one context.
        budget: when to stop.
        number: number of the item; another has other random numbers.
        is_exact: whether values are exact, whatever is drawn: those of an autoregressive run.
    """
    if is_exact:
        rows = np.zeros(sharding.num_batch_devices())
        exact = np.array([_values(values_fn, 0, part, rows)[0] for part in parts])
        return _found(np.stack([exact, exact]))._replace(num_times=0, is_decided=True)
    values = np.zeros((0, len(parts)))
    for drawn in passes(values_fn, parts, batch_size=budget.batch_size, seed=(budget.seed, number)):
        values = np.concatenate([values, drawn])
        if len(values) < _LEAST_PASSES:
            continue
        found = _found(values)
        widened = likelihoods.quantile(len(values) - 1) / likelihoods.quantile(10**6)
        if len(parts) == 1:
            is_enough = widened * found.stderrs[0] <= budget.target_stderr * parts[0].num_tokens
        else:
            leads, stderrs = _leads(values, found.best)
            is_enough = bool((leads > _ERRORS * widened * stderrs).all())
        if is_enough or len(values) * DRAWS >= budget.num_times:
            return found._replace(is_decided=is_enough)
    raise AssertionError("passes have no end")


def _found(values: Float[np.ndarray, "K C"]) -> Found:
    means, stderrs = values.mean(axis=0), values.std(axis=0, ddof=1) / math.sqrt(len(values))
    best = int(means.argmin())
    lead = lead_stderr = None
    if len(means) > 1:
        leads, lead_stderrs = _leads(values, best)
        lead, lead_stderr = float(leads.min()), float(lead_stderrs[leads.argmin()])
    return Found(means.tolist(), stderrs.tolist(), len(values) * DRAWS, best, lead, lead_stderr, False)


def _leads(values: Float[np.ndarray, "K C"], best: int) -> tuple[Float[np.ndarray, "_"], Float[np.ndarray, "_"]]:
    """How much lower the best is than each other, and the standard errors of that."""
    differences = np.delete(values, best, axis=1) - values[:, best : best + 1]
    return differences.mean(axis=0), differences.std(axis=0, ddof=1) / math.sqrt(len(values))
