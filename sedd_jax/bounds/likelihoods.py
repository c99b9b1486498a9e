"""Bounds on the likelihood of text, estimated from random times and noise."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, Key

from sedd_jax import runs
from sedd_jax.diffusion import forward, time_laws
from sedd_jax.model import networks, objectives
from sedd_jax.runtime import errors, sharding

# (key, x0, t) -> K estimates of each sequence, in nats.
ValuesFn = Callable[
    [Key[Array, ""], Int[np.ndarray, "B L"], Float[np.ndarray, "B"]],
    Float[Array, "K B"],
]
# The same for any model: (model, key, x0, t).
ModelValuesFn = Callable[
    [networks.Model, Key[Array, ""], Int[np.ndarray, "B L"], Float[np.ndarray, "B"]],
    Float[Array, "K B"],
]

# The bounds that a run can have, in the order in which tables show them.
BOUNDS = ("score_entropy", "cross_entropy", "negative_log_likelihood")


# Groups of sequences with noise times of their own. Sixteen give the error of two passes 16 degrees of freedom; more
# would spread the times of a pass less evenly.
MOST_GROUPS = 16
_LEAST_SEQUENCES = 8  # in a group, so that its times cover the interval
_LEAST_FREEDOM = 24  # below this a standard error is too rough to stop at: values near t = 0 are rare and large
_NORMAL = 1.959964  # the same quantile as `quantile`, without end


class Estimate(NamedTuple):
    """A mean over sequences, and what times and noise leave open of it, in nats per token.

    Attributes:
        mean: the mean.
        stderr: its standard error: 0 where the mean is exact, infinite where one pass cannot tell.
        freedom: degrees of freedom of the standard error.
    """

    mean: float
    stderr: float
    freedom: int

    @property
    def half_width(self) -> float:
        """Half the width of the interval that holds the expected mean with a probability of 95 % (Student's t)."""
        return self.stderr * quantile(self.freedom) if self.stderr else 0.0


class Pass(NamedTuple):
    """Estimates from one draw of time and noise for every sequence.

    Attributes:
        groups: of each of the K quantities, what each group of sequences adds to the mean over all, in nats per token.
        is_exact: whether times and noise change nothing.
    """

    groups: list[list[float]]
    is_exact: bool = False


def check(num_times: int | None, target_stderr: float, batch_size: int) -> None:
    """Raises errors.UserError where draws could never stop, or begin."""
    for name, value in (("num_times", num_times), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise errors.UserError("must be at least 1", field=name, value=value)
    if not target_stderr > 0:
        raise errors.UserError(
            "must be above 0", field="target_stderr", value=target_stderr, remedy="give one such as 0.01"
        )


def prior(process: forward.Process) -> float:
    """The prior term: KL divergence of p(xt | x0) at t = 1 from the start of generation, in nats per token."""
    return float(process.graph.limit_divergence(process.noise.sigma(jnp.float32(1.0))))


def make_values_fn(run: runs.Run, *, with_reconstruction: bool = False) -> ModelValuesFn:
    """A compiled function that gives each sequence's score-entropy bound, cross-entropy bound and reconstruction term.

    The last only if asked for. Every process holds the values of all sequences.
    """
    process = run.process

    def values(model, key, x0, t):
        found = objectives.sequence_bounds(key, model, process, x0, t)
        rows = [found.score_entropy, found.cross_entropy]
        if with_reconstruction:
            rows.append(objectives.sequence_reconstruction(jax.random.fold_in(key, 1), model, process, x0))
        return sharding.replicate(jnp.stack(rows))

    return jax.jit(values)


def passes(
    values_fn: ValuesFn,
    sequences: Integer[np.ndarray, "S L"],
    *,
    batch_size: int,
    seed: int,
    first: int = 0,
    is_exact: bool = False,
    report: Callable[[int, float], None] = lambda number, done: None,
) -> Iterator[Pass]:
    """Draws passes over all sequences, without end; pass k depends on (seed, k) alone.

    Sequences are dealt to at most 16 groups, the same in every pass. In a pass the times of a group are spread evenly
    over [T_MIN, 1], in random order. This removes the variance that independent times would have. It also ties the
    times of a group together, so only groups, and passes, are independent of each other.

    Args:
        values_fn: estimates of a batch, from `make_values_fn` with a model.
        sequences: tokens.
        batch_size: sequences in one call, rounded up to fill the devices. The last batch is padded to this size.
        seed: seed of times and noise.
        first: number of the first pass to draw; those before are known.
        is_exact: whether values depend on neither time nor noise, so that a pass has no error.
        report: called with the number of a pass and the share of it that is done.
    """
    num_sequences, length = sequences.shape
    num_groups = max(1, min(MOST_GROUPS, num_sequences // _LEAST_SEQUENCES))
    devices = sharding.num_batch_devices()
    batch_size = -(-min(batch_size, num_sequences) // devices) * devices
    for number in itertools.count(first):
        t = _times(np.random.default_rng((seed, number)), num_sequences, num_groups)
        parts = []
        for start in range(0, num_sequences, batch_size):
            rows = np.arange(start, start + batch_size) % num_sequences
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), start)
            found = values_fn(key, sequences[rows].astype(np.int32), t[rows].astype(np.float32))
            parts.append(np.asarray(jax.device_get(found), np.float64)[:, : num_sequences - start])
            report(number, min(1.0, (start + batch_size) / num_sequences))
        values = np.concatenate(parts, axis=1) / (length * num_sequences)
        groups = [values[:, group::num_groups].sum(axis=1) for group in range(num_groups)]
        yield Pass(np.stack(groups, axis=1).tolist(), is_exact)


def _times(generator: np.random.Generator, num_sequences: int, num_groups: int) -> Float[np.ndarray, "S"]:
    """Times of all sequences, those of group g, g + G, g + 2 G ... spread evenly over [T_MIN, 1]."""
    u = np.empty(num_sequences)
    for group in range(num_groups):
        size = len(u[group::num_groups])
        u[group::num_groups] = (generator.permutation(size) + generator.random()) / size
    return time_laws.T_MIN + (1 - time_laws.T_MIN) * u


def combine(done: Sequence[Pass]) -> list[Estimate]:
    """Means over passes with their standard errors, for each quantity.

    The error is the spread of each group's values over passes, added up over groups. What sets sequences apart is the
    same in every pass, so it is no part of it.
    """
    values, num_passes = np.array([found.groups for found in done]), len(done)
    means = values.sum(axis=2).mean(axis=0)
    if done[0].is_exact:
        return [Estimate(float(mean), 0.0, 0) for mean in means]
    freedom = values.shape[2] * (num_passes - 1)
    if not freedom:
        return [Estimate(float(mean), math.inf, 0) for mean in means]
    stderrs = np.sqrt(values.var(axis=0, ddof=1).sum(axis=1) / num_passes)
    return [Estimate(float(mean), float(stderr), freedom) for mean, stderr in zip(means, stderrs, strict=True)]


def difference(ours: Sequence[Pass], others: Sequence[Pass]) -> list[Pass]:
    """Passes of the difference of two models that read the same sequences at the same times and noise."""
    number = max(len(ours), len(others))
    spread = lambda done: list(done) * number if done[0].is_exact else done
    return [
        Pass((np.array(one.groups) - np.array(other.groups)).tolist(), one.is_exact and other.is_exact)
        for one, other in zip(spread(ours)[:number], spread(others)[:number], strict=True)
    ]


def num_passes(done: Sequence[Pass], target_stderr: float, *, most: int) -> int:
    """Number of passes that a standard error takes, estimated from those done so far: all done if it is reached.

    An error of few degrees of freedom is taken to be as much larger as its interval is wider.
    """
    if not done:
        return 1 if most == 1 else 2
    estimates = combine(done)[:2]
    if done[0].is_exact:
        return len(done)
    num_groups = len(done[0].groups[0])
    least = min(most, 1 + -(-_LEAST_FREEDOM // num_groups))
    if len(done) < least:
        return least
    stderr = max(estimate.half_width for estimate in estimates) / _NORMAL
    if stderr <= target_stderr:
        return len(done)
    return min(most, max(len(done) + 1, math.ceil(len(done) * min(1e6, stderr / target_stderr) ** 2)))


def quantile(freedom: int) -> float:
    """What Student's t with so many degrees of freedom stays below in size with a probability of 95 %.

    From three degrees on by its expansion around the normal distribution (Abramowitz and Stegun, 26.7.5).
    """
    if freedom < 3:
        return (math.inf, 12.7062, 4.3027)[freedom]
    z, n = _NORMAL, freedom
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n**power for power, term in enumerate(terms, start=1))


def make_held_out(run: runs.Run) -> Callable[[networks.Params], dict[str, float]]:
    """A function of parameters that gives the bounds on held-out text, in bits per character or token.

    The text is a fixed subset of the valid split, spread evenly over it.
    """
    data = run.split("valid")
    sequences = data.spread(run.config.training.eval_sequences)
    values_fn = make_values_fn(run)
    per_unit = data.characters_per_token if run.tokenizer.unit == "character" else 1.0

    def held_out(params: networks.Params) -> dict[str, float]:
        of_model = functools.partial(values_fn, networks.Model(run.network, params))
        # A batch of this size is known to fit in memory.
        size = run.config.training.batch_size // run.config.training.num_micro_batches
        drawn = passes(of_model, sequences, batch_size=size, seed=0, is_exact=run.is_autoregressive)
        # An error takes two passes.
        done = list(itertools.islice(drawn, 1 if run.is_autoregressive else 2))
        metrics = {}
        for name, bound in named_bounds(run, combine(done)).items():
            metrics[f"valid/{name}_bits"] = bound.mean / (math.log(2) * per_unit)
            metrics[f"valid/{name}_bits_stderr"] = bound.stderr / (math.log(2) * per_unit)
        return metrics

    return held_out


def named_bounds(run: runs.Run, estimates: Sequence[Estimate]) -> dict[str, Estimate]:
    """Estimates by name: the exact likelihood of the autoregressive baseline, or the bounds that the graph has."""
    if run.is_autoregressive:
        return {"negative_log_likelihood": estimates[0]}
    names = ("score_entropy", "cross_entropy") if run.graph.has_cross_entropy else ("score_entropy",)
    return dict(zip(names, estimates, strict=False))
