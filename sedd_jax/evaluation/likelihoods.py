"""Bounds on the likelihood of text, estimated from random times and noise."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, Key

from sedd_jax import runs
from sedd_jax.diffusion import forward, losses
from sedd_jax.model import networks, objectives
from sedd_jax.runtime import sharding

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


class Estimate(NamedTuple):
    """A mean over sequences and its standard error, in nats per token."""

    mean: float
    stderr: float


class Pass(NamedTuple):
    """Estimates from one draw of time and noise for every sequence.

    Attributes:
        means: mean of each of the K quantities, in nats per token.
        variances: variance of each mean.
    """

    means: list[float]
    variances: list[float]


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

    In a pass the times of the S sequences are spread evenly over [T_MIN, 1], in random order. This removes the variance
    that independent times would have. What is left is estimated from differences between neighbours in time (Wolter
    2007, Introduction to Variance Estimation, section 8.2). The estimate is an upper one: neighbours are different
    sequences, and that difference adds no error to a mean over all of them.

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
    devices = sharding.num_batch_devices()
    batch_size = -(-min(batch_size, num_sequences) // devices) * devices
    generator = np.random.default_rng(seed)
    number = 0
    while True:
        order, offset = generator.permutation(num_sequences), generator.random()
        if number >= first:
            t = losses.T_MIN + (1 - losses.T_MIN) * (order + offset) / num_sequences
            parts = []
            for start in range(0, num_sequences, batch_size):
                rows = np.arange(start, start + batch_size) % num_sequences
                key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), start)
                found = values_fn(key, sequences[rows].astype(np.int32), t[rows].astype(np.float32))
                parts.append(np.asarray(jax.device_get(found), np.float64)[:, : num_sequences - start])
                report(number, min(1.0, (start + batch_size) / num_sequences))
            values = np.concatenate(parts, axis=1) / length
            differences = np.diff(values[:, np.argsort(order)], axis=1)
            # A single sequence has no neighbour, so its error is unknown.
            variance = np.square(differences).mean(axis=1) / 2 if num_sequences > 1 else np.full(len(values), np.inf)
            variance = np.zeros(len(values)) if is_exact else variance
            yield Pass(values.mean(axis=1).tolist(), (variance / num_sequences).tolist())
        number += 1


def combine(done: Sequence[Pass]) -> list[Estimate]:
    """Means over passes with their standard errors, for each quantity."""
    means = np.mean([found.means for found in done], axis=0)
    variances = np.sum([found.variances for found in done], axis=0) / len(done) ** 2
    return [Estimate(float(mean), math.sqrt(variance)) for mean, variance in zip(means, variances, strict=True)]


def make_held_out(run: runs.Run) -> Callable[[networks.Params], dict[str, float]]:
    """A function of parameters that gives the bounds on held-out text, in bits per character or token.

    The text is a fixed subset of the valid split, spread evenly over it.
    """
    data = run.split("valid")
    every = -(-data.num_sequences // run.config.training.eval_sequences)
    sequences = data.sequences()[::every]
    values_fn = make_values_fn(run)
    per_unit = data.characters_per_token if run.tokenizer.unit == "character" else 1.0

    def held_out(params: networks.Params) -> dict[str, float]:
        of_model = functools.partial(values_fn, networks.Model(run.network, params))
        # A batch of this size is known to fit in memory.
        size = run.config.training.batch_size // run.config.training.num_micro_batches
        drawn = passes(of_model, sequences, batch_size=size, seed=0, is_exact=run.is_autoregressive)
        metrics = {}
        for name, bound in named_bounds(run, combine([next(drawn)])).items():
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
