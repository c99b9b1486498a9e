"""Quality of generated text: its perplexity under a judge, and its entropy.

Perplexity alone misleads: repetitive text is easy to predict. So it is always reported with the entropy of the text.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.evaluation import judges, results, tables
from sedd_jax.model import sampling_config
from sedd_jax.reverse import samplers
from sedd_jax.runtime import storage
from sedd_jax.sampling import generate

# Samples whose unigram entropy is lower than that of held-out text by more than this, in nats, count as annealed.
# What `read` finds at least.
FIGURES = ("gen_ppl_per_sequence", "gen_ppl_pooled", "cross_entropy", "divergence", "unigram_entropy")
_ANNEALED = 0.15


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """How many sequences a measurement draws.

    Attributes:
        num_samples: sequences; attempts at each problem in `code_problems`.
        batch_size: sequences drawn at once.
        seed: seed of the samples and of the choice of held-out sequences.
    """

    num_samples: int = 64
    batch_size: int = 32
    seed: int = 0


SAMPLES = Samples()


def measure(
    workdir: storage.Directory,
    judge: str,
    *,
    step: int | None = None,
    samples: Samples = SAMPLES,
    **settings: Any,
) -> dict[str, Any]:
    """Draws samples from a run and scores them with a judge, beside as many held-out sequences.

    Args:
        workdir: the run directory.
        judge: see `judges.open_judge`; its tokenizer may differ from the run's.
        step: the run's checkpoint; the newest if None.
        samples: how many samples.
        **settings: fields of `config.SamplingConfig` that differ from the run's: sampler, num_steps, draw.

    Returns:
        The figures of `read` for the samples and for the held-out text, and the first samples as text.
    """
    run, reader = runs.load(workdir), judges.open_judge(judge)
    sampling = run.sampling(num_samples=samples.batch_size, **settings)
    opened = run.restore(step)
    real, sha256 = held_out(run, samples.num_samples, samples.seed)
    # Scored before anything is drawn, in case the judge cannot read this text.
    of_text = read(run, reader, real)
    taken: list[int] = []
    drawn = draw(opened, sampling, samples.num_samples, samples.seed, count=taken.extend)
    result = {
        **results.circumstances(opened),
        "judge": reader.name,
        "judge_first": reader.first,
        "length": run.config.data.length,
        "data_sha256": sha256,
        "num_samples": samples.num_samples,
        **described(run, sampling),
        "batch_size": samples.batch_size,
        "seed": samples.seed,
    }
    name = results.name("generation", result)
    result["samples"], result["held_out"] = read(run, reader, drawn), of_text
    if is_adaptive(sampling.sampler):
        result["mean_nfe"] = float(np.mean(taken))
    result["texts"] = [run.tokenizer.decode(row) for row in drawn[: results.KEPT_TEXTS]]
    results.keep(run, name, result)
    return result


def table(result: dict[str, Any]) -> tables.Table:
    """The result of `measure` as a table, with a warning where low entropy flatters the samples."""
    samples, real = result["samples"], result["held_out"]
    titles = {
        "gen_ppl_per_sequence": "perplexity, mean of sequences",
        "gen_ppl_pooled": "perplexity, pooled over tokens",
        "unigram_entropy": "unigram entropy, nats",
        "distinct_1": "distinct tokens",
        "distinct_2": "distinct pairs",
        "distinct_3": "distinct triples",
    }
    return tables.Table(
        head=[
            f"{result['workdir']}  step {result['step']}  {result['num_samples']} samples of {result['length']} "
            f"tokens, {how(result)}, {result['dtype']}",
            f"read by {result['judge']}, {('every token', 'every token but the first')[result['judge_first']]}",
        ],
        columns=("", "samples", "held-out text"),
        rows=[(title, cell(samples, name), cell(real, name)) for name, title in titles.items()],
        notes=warnings(samples, real),
    )


def cell(found: dict[str, Any], name: str) -> str:
    """One figure of `read`, with its standard error if it has one. There may be no figure."""
    return tables.estimate(found[name], found.get(f"{name}_stderr"))


def warnings(samples: dict[str, Any], real: dict[str, Any]) -> list[str]:
    """Warnings if the samples have clearly less entropy than held-out text, or the judge reads nothing of some."""
    found = []
    if samples["unigram_entropy"] < real["unigram_entropy"] - _ANNEALED:
        found.append(
            "warning: samples have less entropy than text, so repetition lowers their perplexity (annealing): compare "
            "at equal entropy only"
        )
    if unread := samples.get("num_unread"):
        found.append(f"warning: {unread} samples have nothing that the judge reads, so their perplexity does not count")
    return found


def described(run: runs.Run, sampling: configs.SamplingConfig, num_gaps: int | None = None) -> dict[str, Any]:
    """Fields of a result that say how samples with `num_gaps` tokens to fill (the whole length if None) are drawn."""
    return {
        "sampler": generate.sampler_name(run, sampling),
        "nfe": generate.num_evaluations(run, sampling, num_gaps),
        "draw": sampling.draw,
        **sampling_config.refinements(sampling),
    }


def how(result: dict[str, Any]) -> str:
    """The fields of `described`, in words."""
    nfe = f"nfe at most {result['nfe']}" if is_adaptive(result["sampler"]) else f"nfe {result['nfe']}"
    if "mean_nfe" in result:
        nfe = f"nfe {result['mean_nfe']:.1f} on average, {nfe.removeprefix('nfe ')}"
    return ", ".join([named(result["sampler"]), nfe, f"{result['draw']} draws", *changed(result)])


def is_adaptive(sampler: str) -> bool:
    """Whether a sampler may take fewer evaluations than asked for; that of autoregressive runs does not."""
    return sampler in samplers.SAMPLERS and samplers.SAMPLERS[sampler].traits.is_adaptive


def named(sampler: str) -> str:
    """The name of a sampler, and that it is biased if it is."""
    is_biased = sampler in samplers.SAMPLERS and samplers.SAMPLERS[sampler].traits.is_biased
    return f"{sampler} (biased)" if is_biased else sampler


def changed(result: dict[str, Any]) -> list[str]:
    """The refinements of a result's sampler that differ from their defaults, in words."""
    # Results of older versions lack the settings that were added later.
    found = {name: result[name] for name in sampling_config.REFINEMENTS if name in result}
    kind = lambda name: "annealed, " if name in ("temperature", "top_p") and found[name] < 1 else ""
    return [
        f"{kind(name)}{name}={value}" for name, value in found.items() if value != sampling_config.REFINEMENTS[name]
    ]


def held_out(run: runs.Run, num_samples: int, seed: int) -> tuple[Int[np.ndarray, "S L"], str]:
    """Random held-out sequences of the run's own text, at most `num_samples`, and the checksum of that text."""
    split = run.split("valid")
    sequences = split.sequences()
    return sequences[np.random.default_rng(seed).permutation(len(sequences))[:num_samples]].astype(
        np.int32
    ), split.sha256


def draw(
    opened: runs.OpenRun,
    sampling: configs.SamplingConfig,
    num_samples: int,
    seed: int,
    *,
    count: generate.CountFn | None = None,
) -> Int[np.ndarray, "S L"]:
    """Draws unconditional samples, `sampling.num_samples` at once, on the mesh of all devices."""
    nothing = np.zeros((num_samples, opened.run.config.data.length), np.int32)
    return fill(opened, sampling, nothing, nothing.astype(bool), seed, count=count)


def fill(
    opened: runs.OpenRun,
    sampling: configs.SamplingConfig,
    tokens: Int[np.ndarray, "S L"],
    is_given: Bool[np.ndarray, "S L"],
    seed: int,
    *,
    count: generate.CountFn | None = None,
) -> Int[np.ndarray, "S L"]:
    """Fills the tokens that are not given, `sampling.num_samples` sequences at once, on the mesh of all devices."""
    with opened.on_devices():
        return np.concatenate(list(generate.draw_batches(opened, tokens, is_given, sampling, seed=seed, count=count)))


def read(run: runs.Run, judge: judges.Judge, tokens: Int[np.ndarray, "S L"], num_draws: int = 1) -> dict[str, Any]:
    """Figures of sequences: perplexity under a judge, entropy and distinct n-grams.

    Args:
        run: the run whose tokens these are.
        judge: scores them.
        tokens: the sequences. With several draws of each, first all of the first draw, then all of the second.
        num_draws: draws of each sequence. Standard errors count the draws of a sequence once, as their mean.

    Returns:
        `gen_ppl_per_sequence`, the mean of the sequences' perplexities, as published; `gen_ppl_pooled`, the perplexity
        over all tokens; `unigram_entropy` of a sequence's tokens in nats; `distinct_1` to `distinct_3`, the share of
        n-grams that are distinct, None where sequences are shorter; `cross_entropy` under the judge in nats per token
        of the run; `divergence`, which is `cross_entropy` minus `unigram_entropy`. Means over sequences have a standard
        error with the suffix `_stderr`.
    """
    texts = judge.tokens(run, tokens)
    log_likelihoods = judge.log_likelihoods(texts)
    # The tokens that the judge does not read, such as the first of a window, count as those that it reads.
    num_read = np.array([len(values) for values in log_likelihoods])
    per_read = _ratio(-np.array([values.sum() for values in log_likelihoods]), num_read)
    cross_entropies = per_read * [sum(map(len, rows)) for rows in texts] / tokens.shape[1]
    entropies = _entropies(tokens)
    return {
        **_perplexities(log_likelihoods, num_draws),
        **_mean_read("cross_entropy", cross_entropies, num_draws),
        **_mean_read("divergence", cross_entropies - entropies, num_draws),
        **_mean("unigram_entropy", entropies, num_draws),
        **_diversity(tokens),
    }


def _mean(name: str, values: Float[np.ndarray, " S"], num_draws: int) -> dict[str, float | None]:
    return {name: float(values.mean()), f"{name}_stderr": stderr(values.reshape(num_draws, -1).mean(0))}


def _mean_read(name: str, values: Float[np.ndarray, " S"], num_draws: int) -> dict[str, float | None]:
    """`_mean` without what is NaN: sequences of which the judge reads nothing. None where that is all of them."""
    draws = values.reshape(num_draws, -1)
    means = np.nanmean(draws[:, np.isfinite(draws).any(axis=0)], axis=0)
    return {name: float(means.mean()) if means.size else None, f"{name}_stderr": stderr(means)}


def _ratio(total: Float[np.ndarray, " S"], counts: Int[np.ndarray, " S"]) -> Float[np.ndarray, " S"]:
    return np.divide(total, counts, out=np.full(len(counts), np.nan), where=counts > 0)


def _perplexities(log_likelihoods: list[Float[np.ndarray, "_"]], num_draws: int = 1) -> dict[str, Any]:
    counts = np.array([len(values) for values in log_likelihoods])
    total = -np.array([values.sum() for values in log_likelihoods])
    return {
        **_mean_read("gen_ppl_per_sequence", np.exp(_ratio(total, counts)), num_draws),
        "gen_ppl_pooled": float(np.exp(total.sum() / counts.sum())) if counts.any() else None,
        "num_unread": int((counts == 0).sum()),
    }


def _entropies(tokens: Int[np.ndarray, "S L"]) -> Float[np.ndarray, " S"]:
    """Unigram entropy of each sequence, in nats."""
    shares = [np.unique(row, return_counts=True)[1] / len(row) for row in tokens]
    return np.array([-(share * np.log(share)).sum() for share in shares])


def _diversity(tokens: Int[np.ndarray, "S L"]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for n in (1, 2, 3):
        if n > tokens.shape[1]:
            found[f"distinct_{n}"] = None
            continue
        grams = np.lib.stride_tricks.sliding_window_view(tokens, n, axis=1).reshape(-1, n)
        found[f"distinct_{n}"] = len(np.unique(grams, axis=0)) / len(grams)
    return found


def stderr(values: Float[np.ndarray, " S"]) -> float | None:
    """Standard error of a mean; None for a single value."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
