"""Bounds on the likelihood of held-out text."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Integer, Key

from sedd_jax import batches, losses, networks, runs, score_heads, sharding, storage


class Estimate(NamedTuple):
    """A mean over sequences and its standard error, in nats per token."""

    mean: float
    stderr: float


def sequence_bounds(
    params: networks.Params,
    key: Key[Array, ""],
    x0: Int[Array, "B L"],
    t: Float[Array, "B"],
    *,
    run: runs.Run,
    dropout_key: Key[Array, ""] | None = None,
) -> losses.Bounds:
    """The bounds of each sequence for one draw of noise at times t; what training minimises and evaluation reports."""

    def summary_fn(xt: Int[Array, "B L"], x0: Int[Array, "B L"], sigma: Float[Array, "B"]):
        features = networks.apply(run.network, params, xt, sigma, dropout_key)
        return score_heads.summarize(run.network, params, features, xt, x0, sigma, run.graph.is_noise(xt))

    return losses.denoising_score_entropy(key, summary_fn, run.graph, run.noise, x0, t)


def make_bounds_fn(run: runs.Run):
    """A compiled `sequence_bounds(params, key, x0, t)` for this run, whose values every process holds."""

    def bounds(params, key, x0, t):
        return jax.tree.map(sharding.replicate, sequence_bounds(params, key, x0, t, run=run))

    return jax.jit(bounds)


def estimate_bounds(
    bounds_fn,
    params: networks.Params,
    sequences: Integer[np.ndarray, "S L"],
    *,
    batch_size: int,
    num_times: int,
    seed: int,
) -> tuple[Estimate, Estimate]:
    """Score-entropy and cross-entropy bound of sequences, with `num_times` draws of time and noise for each.

    In every pass the times of the S sequences are spread evenly over [1e-3, 1] in random order. The standard error is
    that of the bound on this text, from differences between neighbours in time (Wolter 2007, Introduction to Variance
    Estimation, section 8.2), since the spread removes the variation over time that independent times would have.

    Args:
        bounds_fn: from `make_bounds_fn`.
        params: parameters, usually the moving average.
        sequences: tokens.
        batch_size: sequences in one call, rounded up to fill the devices; the last call is filled up and its filling
            dropped.
        num_times: passes over the sequences.
        seed: of times and noise.
    """
    num_sequences, length = sequences.shape
    devices = sharding.num_batch_devices()
    batch_size = -(-min(batch_size, num_sequences) // devices) * devices
    generator = np.random.default_rng(seed)
    means, variances = np.zeros(2), np.zeros(2)
    for number in range(num_times):
        order = generator.permutation(num_sequences)
        t = losses.T_MIN + (1 - losses.T_MIN) * (order + generator.random()) / num_sequences
        values = np.zeros((2, num_sequences))
        for start in range(0, num_sequences, batch_size):
            rows = np.arange(start, start + batch_size) % num_sequences
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), start)
            bounds = bounds_fn(params, key, sequences[rows].astype(np.int32), t[rows].astype(np.float32))
            kept = min(batch_size, num_sequences - start)
            values[:, start : start + kept] = np.asarray(jax.device_get(bounds))[:, :kept] / length
        means += values.mean(axis=1) / num_times
        differences = np.diff(values[:, np.argsort(order)], axis=1)
        # With a single sequence there is no neighbour, and no error can be stated.
        variance = np.square(differences).mean(axis=1) / 2 if num_sequences > 1 else np.inf
        variances += variance / (num_sequences * num_times**2)
    return Estimate(float(means[0]), math.sqrt(variances[0])), Estimate(float(means[1]), math.sqrt(variances[1]))


def make_held_out(run: runs.Run) -> Callable[[Any], dict[str, float]]:
    """A function of parameters that bounds a fixed part of the valid split, spread evenly over it, in bits."""
    data = run.split("valid")
    every = -(-data.num_sequences // run.config.training.eval_sequences)
    sequences = data.sequences()[::every]
    bounds_fn = make_bounds_fn(run)
    per_unit = data.characters_per_token if run.tokenizer.unit == "character" else 1.0

    def held_out(params: Any) -> dict[str, float]:
        estimates = estimate_bounds(
            bounds_fn, params, sequences, batch_size=run.config.training.batch_size, num_times=1, seed=0
        )
        metrics = {}
        named = {"score_entropy": estimates[0]}
        if run.config.graph.name == "absorb":
            named["cross_entropy"] = estimates[1]
        for name, bound in named.items():
            metrics[f"valid/{name}_bits"] = bound.mean / (math.log(2) * per_unit)
            metrics[f"valid/{name}_bits_stderr"] = bound.stderr / (math.log(2) * per_unit)
        return metrics

    return held_out


def evaluate(
    workdir: storage.Directory,
    *,
    step: int | None = None,
    split: str = "valid",
    num_times: int = 8,
    batch_size: int = 32,
    seed: int = 0,
) -> dict[str, object]:
    """Both bounds of a run's checkpoint (its moving average) on one split.

    Args:
        workdir: the run directory.
        step: the checkpoint; the newest if None.
        split: train, valid or test.
        num_times: draws of time and noise for every sequence; more lower the standard error.
        batch_size: sequences evaluated at once.
        seed: of times and noise.

    Returns:
        Figures with what they are of: per token in nats, per character in bits, and `ppl_bound` = exp(nats per token).
        The bounds integrate over t in [1e-3, 1] and leave out the prior and reconstruction terms, as the published
        figures do.
    """
    for name, value in (("num_times", num_times), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"--{name}={value} must be at least 1")
    run = runs.load(workdir)
    data = run.split(split)
    sequences = data.sequences()
    mesh = sharding.make_mesh(sharding.MeshConfig())
    step, params = run.ema_params(mesh, step)
    with jax.set_mesh(mesh):
        score_entropy, cross_entropy = estimate_bounds(
            make_bounds_fn(run), params, sequences, batch_size=batch_size, num_times=num_times, seed=seed
        )
    result: dict[str, object] = {
        "workdir": str(workdir),
        "step": step,
        "split": split,
        "num_sequences": len(sequences),
        "length": run.config.data.length,
        "num_times": num_times,
        "seed": seed,
        "characters_per_token": data.characters_per_token,
        "dtype": run.config.network.dtype,
    }
    named = {"score_entropy": score_entropy}
    if run.config.graph.name == "absorb":
        named["cross_entropy"] = cross_entropy
    for name, bound in named.items():
        bits = 1 / (math.log(2) * data.characters_per_token)
        ppl_bound = math.exp(bound.mean)
        result[name] = {
            "nats_per_token": bound.mean,
            "nats_per_token_stderr": bound.stderr,
            "bits_per_character": bound.mean * bits,
            "bits_per_character_stderr": bound.stderr * bits,
            "ppl_bound": ppl_bound,
            "ppl_bound_stderr": ppl_bound * bound.stderr,
        }
    if run.tokenizer.unit == "character":
        known = batches.entropies(data.tokens.read(0, data.num_tokens), run.graph.num_states)
        result["unigram_entropy_bits"], result["bigram_entropy_bits"] = known
    return result


def table(result: dict) -> str:
    """The figures of `evaluate` as text."""
    lines = [
        f"{result['workdir']}  step {result['step']}  {result['split']}: {result['num_sequences']} sequences of "
        f"{result['length']} tokens, {result['num_times']} times each, t in [1e-3, 1], {result['dtype']}",
        f"{'bound':<16}{'nats/token':>20}{'bits/character':>20}{'ppl_bound':>22}",
    ]
    for name in ("score_entropy", "cross_entropy"):
        if name not in result:
            lines.append(
                f"{name.replace('_', '-'):<16}  not defined for the uniform graph, whose ratios have no known sum"
            )
            continue
        cells = [
            f"{result[name][figure]:.4f} ± {result[name][f'{figure}_stderr']:.4f}"
            for figure in ("nats_per_token", "bits_per_character", "ppl_bound")
        ]
        lines.append(f"{name.replace('_', '-'):<16}{cells[0]:>20}{cells[1]:>20}{cells[2]:>22}")
    if "bigram_entropy_bits" in result:
        lines.append(
            f"for comparison, this text's own entropy in bits/character: {result['unigram_entropy_bits']:.4f} unigram, "
            f"{result['bigram_entropy_bits']:.4f} bigram (a character given the one before)"
        )
    return "\n".join(lines)
