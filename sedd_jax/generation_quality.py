"""Generated text, measured: perplexity under a judge, never without the entropy that tells how it was bought."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from sedd_jax import autoregression, generate, graphs, networks, runs, samplers, sharding, storage
from sedd_jax import config as configs

# Samples whose unigram entropy is this far below that of held-out text, in nats, are called annealed.
_ANNEALED = 0.15
_WINDOWS = 16  # read at once


def measure(
    workdir: storage.Directory,
    judge: storage.Directory,
    *,
    step: int | None = None,
    num_samples: int = 64,
    batch_size: int = 16,
    seed: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    """Draws samples of a run and has them read by a judge, beside as much held-out text.

    Args:
        workdir: the run directory.
        judge: an autoregressive run, whose tokenizer may be another.
        step: the run's checkpoint; the newest if None.
        num_samples: sequences.
        batch_size: sequences drawn at once.
        seed: of the samples.
        **settings: fields of `config.SamplingConfig` that differ from the run's: sampler, num_steps, draw.

    Returns:
        For samples and held-out text: `gen_ppl_per_sequence`, the mean of each sequence's perplexity, as published;
        `gen_ppl_pooled`, over all tokens; `unigram_entropy` of a sequence's tokens in nats; `distinct_1` to
        `distinct_3`, the share of n-grams that differ.
    """
    run, reader = runs.load(workdir), runs.load(judge)
    if not reader.is_autoregressive:
        raise ValueError(f"--judge={judge} is no autoregressive run: train one with config.graph.name=autoregressive")
    sampling = generate.sampling_of(run, num_samples=batch_size, **settings)
    mesh = sharding.make_mesh(sharding.MeshConfig())
    step, params = run.ema_params(mesh, step)
    judge_step, judge_params = reader.ema_params(mesh)
    held_out = run.split("valid").sequences()
    held_out = held_out[np.random.default_rng(seed).permutation(len(held_out))[:num_samples]].astype(np.int32)
    with jax.set_mesh(mesh):
        samples = _draw(run, params, sampling, num_samples, seed)
        read = lambda tokens: {
            **_perplexities(reader, judge_params, _retokenized(run, reader, tokens)),
            **_diversity(tokens),
        }
        return {
            "workdir": str(workdir),
            "step": step,
            "judge": str(judge),
            "judge_step": judge_step,
            "length": run.config.data.length,
            "num_samples": num_samples,
            "sampler": "autoregressive" if run.is_autoregressive else sampling.sampler,
            "nfe": generate.num_evaluations(run, sampling),
            "draw": sampling.draw,
            "dtype": run.config.network.dtype,
            "seed": seed,
            "samples": read(samples),
            "held_out": read(held_out),
        }


def table(result: dict[str, Any]) -> str:
    """What `measure` found as text, with a warning where it flatters."""
    samples, held_out = result["samples"], result["held_out"]
    lines = [
        f"{result['workdir']}  step {result['step']}  {result['num_samples']} samples of {result['length']} tokens, "
        f"{result['sampler']}, nfe {result['nfe']}, {result['draw']} draws, {result['dtype']}",
        f"read by {result['judge']}  step {result['judge_step']}",
        f"{'':<34}{'samples':>20}{'held-out text':>20}",
    ]
    titles = {
        "gen_ppl_per_sequence": "perplexity, mean of sequences",
        "gen_ppl_pooled": "perplexity, pooled over tokens",
        "unigram_entropy": "unigram entropy, nats",
        "distinct_1": "distinct tokens",
        "distinct_2": "distinct pairs",
        "distinct_3": "distinct triples",
    }
    for name, title in titles.items():
        cells = []
        for found in (samples, held_out):
            error = f" ± {found[f'{name}_stderr']:.3f}" if f"{name}_stderr" in found else ""
            cells.append(f"{found[name]:.3f}{error}")
        lines.append(f"{title:<34}{cells[0]:>20}{cells[1]:>20}")
    if samples["unigram_entropy"] < held_out["unigram_entropy"] - _ANNEALED:
        lines.append(
            "warning: samples have less entropy than text, so their perplexity is bought with repetition (annealing): "
            "compare at equal entropy only"
        )
    return "\n".join(lines)


def _draw(
    run: runs.Run, params: networks.Params, sampling: configs.SamplingConfig, num_samples: int, seed: int
) -> Int[np.ndarray, "S L"]:
    shape = (sampling.num_samples, run.config.data.length)
    nothing = samplers.Given(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))
    parts = []
    for index in range(-(-num_samples // sampling.num_samples)):
        (own,) = np.random.SeedSequence([seed, index]).generate_state(1).tolist()
        parts.append(generate.draw_tokens(run, params, nothing, sampling, seed=own))
    return np.concatenate(parts)[:num_samples]


def _retokenized(run: runs.Run, judge: runs.Run, tokens: Int[np.ndarray, "S L"]) -> list[Int[np.ndarray, " _"]]:
    """Each sequence in the judge's tokens."""
    if run.tokenizer.fingerprint() == judge.tokenizer.fingerprint():
        return list(tokens)
    return [judge.tokenizer.encode(run.tokenizer.decode(row)) for row in tokens]


def _perplexities(judge: runs.Run, params: networks.Params, rows: list[Int[np.ndarray, " _"]]) -> dict[str, float]:
    """Of sequences of any lengths, each read in windows of the judge's length from its start."""
    graph, network, length = judge.graph, judge.network, judge.config.data.length
    assert isinstance(graph, graphs.Absorbing)
    windows = [(number, row[at : at + length]) for number, row in enumerate(rows) for at in range(0, len(row), length)]
    padded = np.zeros((-(-len(windows) // _WINDOWS) * _WINDOWS, length), np.int32)
    for place, (_, window) in zip(padded, windows, strict=False):
        place[: len(window)] = window  # What follows changes nothing before it.
    read = jax.jit(lambda x: sharding.replicate(autoregression.log_likelihood(network, params, x, graph)))
    found = np.concatenate([np.asarray(read(padded[at : at + _WINDOWS])) for at in range(0, len(padded), _WINDOWS)])
    total = np.zeros(len(rows))
    for (number, window), values in zip(windows, found, strict=False):
        total[number] -= float(values[: len(window)].sum())
    counts = np.array([max(1, len(row)) for row in rows])
    each = np.exp(total / counts)
    return {
        "gen_ppl_per_sequence": float(each.mean()),
        "gen_ppl_per_sequence_stderr": _stderr(each),
        "gen_ppl_pooled": float(np.exp(total.sum() / counts.sum())),
    }


def _diversity(tokens: Int[np.ndarray, "S L"]) -> dict[str, float]:
    entropies = []
    for row in tokens:
        shares = np.unique(row, return_counts=True)[1] / len(row)
        entropies.append(-float((shares * np.log(shares)).sum()))
    found = {"unigram_entropy": float(np.mean(entropies)), "unigram_entropy_stderr": _stderr(np.array(entropies))}
    for n in (1, 2, 3):
        grams = np.lib.stride_tricks.sliding_window_view(tokens, n, axis=1).reshape(-1, n)
        found[f"distinct_{n}"] = len(np.unique(grams, axis=0)) / len(grams)
    return found


def _stderr(values: Float[np.ndarray, " S"]) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.inf
