"""Bounds on the likelihood of text, estimated from draws of time and noise."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Key

from sedd_jax import runs
from sedd_jax.diffusion import forward, losses
from sedd_jax.model import networks, objectives
from sedd_jax.runtime import sharding

# (params, key, x0, t) -> what is estimated of each sequence, [K, B] in nats.
ValuesFn = Callable[[networks.Params, Key[Array, ""], Any, Any], Float[Array, "K B"]]


# What a run can have, in the order in which figures are shown.
BOUNDS = ("score_entropy", "cross_entropy", "negative_log_likelihood")


class Estimate(NamedTuple):
    """A mean over sequences and its standard error, in nats per token."""

    mean: float
    stderr: float


class Pass(NamedTuple):
    """One draw of time and noise for every sequence: the mean of each quantity in nats per token, and its variance."""

    means: list[float]
    variances: list[float]


def prior(process: forward.Process) -> float:
    """KL divergence of noised tokens at t = 1 from what generation starts with, in nats per token: the prior term."""
    return float(process.graph.limit_divergence(process.noise.sigma(jnp.float32(1.0))))


def make_values_fn(run: runs.Run, *, with_reconstruction: bool = False) -> ValuesFn:
    """A compiled function of a batch: score-entropy bound, cross-entropy bound, and reconstruction where asked for.

    Every process holds all of its values.
    """

    process = run.process

    def values(params, key, x0, t):
        model = networks.Model(run.network, params)
        found = objectives.sequence_bounds(key, model, process, x0, t)
        rows = [found.score_entropy, found.cross_entropy]
        if with_reconstruction:
            rows.append(objectives.sequence_reconstruction(jax.random.fold_in(key, 1), model, process, x0))
        return sharding.replicate(jnp.stack(rows))

    return jax.jit(values)


def passes(
    values_fn: ValuesFn,
    params: networks.Params,
    sequences: Integer[np.ndarray, "S L"],
    *,
    batch_size: int,
    seed: int,
    first: int = 0,
    is_exact: bool = False,
    report: Callable[[int, float], None] = lambda number, done: None,
) -> Iterator[Pass]:
    """Passes over sequences, without end; pass k is a function of (seed, k) alone.

    In each of them the times of the S sequences are spread evenly over [T_MIN, 1] in random order. Its variance is that
    of the mean on this text, from differences between neighbours in time (Wolter 2007, Introduction to Variance
    Estimation, section 8.2), since the spread removes the variation over time that independent times would have. It is
    an upper estimate: neighbours are different sequences, and how these differ changes nothing, as all are read.

    Args:
        values_fn: from `make_values_fn`.
        params: parameters, usually the moving average.
        sequences: tokens.
        batch_size: sequences in one call, rounded up to fill the devices; the last call is filled up and its filling
            dropped.
        seed: of times and noise.
        first: passes that are left out because they are known.
        is_exact: whether values depend on neither time nor noise, so that a pass is without error.
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
                found = values_fn(params, key, sequences[rows].astype(np.int32), t[rows].astype(np.float32))
                parts.append(np.asarray(jax.device_get(found), np.float64)[:, : num_sequences - start])
                report(number, min(1.0, (start + batch_size) / num_sequences))
            values = np.concatenate(parts, axis=1) / length
            differences = np.diff(values[:, np.argsort(order)], axis=1)
            # With a single sequence there is no neighbour, and no error can be stated.
            variance = np.square(differences).mean(axis=1) / 2 if num_sequences > 1 else np.full(len(values), np.inf)
            variance = np.zeros(len(values)) if is_exact else variance
            yield Pass(values.mean(axis=1).tolist(), (variance / num_sequences).tolist())
        number += 1


def combine(done: Sequence[Pass]) -> list[Estimate]:
    """The mean of passes and its standard error, for each quantity."""
    means = np.mean([found.means for found in done], axis=0)
    variances = np.sum([found.variances for found in done], axis=0) / len(done) ** 2
    return [Estimate(float(mean), math.sqrt(variance)) for mean, variance in zip(means, variances, strict=True)]


def make_held_out(run: runs.Run) -> Callable[[Any], dict[str, float]]:
    """A function of parameters that bounds a fixed part of the valid split, spread evenly over it, in bits."""
    data = run.split("valid")
    every = -(-data.num_sequences // run.config.training.eval_sequences)
    sequences = data.sequences()[::every]
    values_fn = make_values_fn(run)
    per_unit = data.characters_per_token if run.tokenizer.unit == "character" else 1.0

    def held_out(params: Any) -> dict[str, float]:
        size = run.config.training.batch_size // run.config.training.num_micro_batches  # What memory is known to hold.
        drawn = passes(values_fn, params, sequences, batch_size=size, seed=0, is_exact=run.is_autoregressive)
        metrics = {}
        for name, bound in named_bounds(run, combine([next(drawn)])).items():
            metrics[f"valid/{name}_bits"] = bound.mean / (math.log(2) * per_unit)
            metrics[f"valid/{name}_bits_stderr"] = bound.stderr / (math.log(2) * per_unit)
        return metrics

    return held_out


def named_bounds(run: runs.Run, estimates: Sequence[Estimate]) -> dict[str, Estimate]:
    """What estimates are called: the exact likelihood of the baseline, or the bounds that the graph has."""
    if run.is_autoregressive:
        return {"negative_log_likelihood": estimates[0]}
    names = ("score_entropy", "cross_entropy") if run.graph.has_cross_entropy else ("score_entropy",)
    return dict(zip(names, estimates, strict=False))
