"""Perplexity: bounds on the likelihood of a run's held-out text, or of other text."""

import dataclasses
import functools
import math
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Integer

from sedd_jax import runs
from sedd_jax.data import batches, corpora, shards
from sedd_jax.diffusion import losses
from sedd_jax.evaluation import likelihoods, results, tables
from sedd_jax.runtime import errors, sharding, storage, terminals

PROTOCOLS = ("published", "strict")
_MAX_TIMES = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a bound is estimated.

    Attributes:
        protocol: published averages over t in [1e-3, 1] and leaves out the prior and reconstruction terms; strict adds
            them. The likelihood of the autoregressive baseline is exact and needs neither.
        num_times: draws of time and noise for every sequence; as many as `target_stderr` takes if None.
        target_stderr: standard error of the bound at which to stop, in nats per token.
        batch_size: sequences evaluated at once.
        seed: seed of times and noise.
    """

    protocol: str = "published"
    num_times: int | None = None
    target_stderr: float = 0.01
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self):
        if self.protocol not in PROTOCOLS:
            remedy = f"choose one of {', '.join(PROTOCOLS)}"
            raise errors.UserError("is unknown", field="protocol", value=self.protocol, remedy=remedy)
        for name, value in (("num_times", self.num_times), ("batch_size", self.batch_size)):
            if value is not None and value < 1:
                raise errors.UserError("must be at least 1", field=name, value=value)
        if not self.target_stderr > 0:
            raise errors.UserError(
                "must be above 0", field="target_stderr", value=self.target_stderr, remedy="give one such as 0.01"
            )


def evaluate(
    workdir: storage.Directory,
    *,
    data: str | None = None,
    split: str | None = None,
    step: int | None = None,
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Bounds on the likelihood of text under a run's checkpoint (the moving average of its parameters).

    Every pass is kept in the run directory. So an interrupted command goes on where it stopped when it is repeated.

    Args:
        workdir: the run directory.
        data: prepared:DIR or another source, tokenized as the run's text was; the run's own text if None.
        split: train, valid or test; if None, valid of the run's own text and test of other text.
        step: the checkpoint; the newest if None.
        settings: how to estimate the bounds; the defaults if None.

    Returns:
        The figures and what they were measured with. For each bound: nats per token, bits per character, `ppl_bound` =
        exp(nats per token) and `ppl_bound_per_word`. Passes stop after `num_times`, or once the standard error is small
        enough.

    Raises:
        errors.UserError: where the text or the checkpoint cannot be had.
    """
    settings = settings or Settings()
    run = runs.load(workdir)
    protocol = settings.protocol
    if run.is_autoregressive:
        # The value depends on neither time nor noise: one pass is enough, and there are no terms at the ends.
        protocol, settings = "exact", dataclasses.replace(settings, protocol="published", num_times=1)
    split = split or ("valid" if data is None else "test")
    with tempfile.TemporaryDirectory() as scratch:
        text = _open(run, data, split, pathlib.Path(scratch))
        opened = run.restore(step)
        # All that a pass is a function of.
        drawn = {"step": opened.step, "split": split, "data_sha256": text.sha256, "length": text.length}
        drawn |= {"protocol": protocol, "seed": settings.seed, "batch_size": settings.batch_size}
        with opened.on_devices():
            name = results.name("likelihood", drawn | {"devices": sharding.num_batch_devices()})
            done = _passes(opened, text.sequences(), settings, name)
    result = {
        **results.circumstances(run, opened.step),
        **drawn,
        "source": data or run.config.data.source,
        "num_sequences": text.num_sequences,
        "left_out_tokens": text.num_tokens - text.num_sequences * text.length,
        "num_times": len(done),
        "characters_per_token": text.characters_per_token,
        "words_per_token": text.words_per_token,
        **_figures(run, text, settings, done),
    }
    results.keep(run, name, result)
    return result


def _open(run: runs.Run, data: str | None, split: str, scratch: pathlib.Path) -> batches.PackedSplit:
    """One split of the run's own text, of prepared text, or of a source, which is tokenized into `scratch`."""
    if data is None:
        return run.split(split)
    length, (kind, _, argument) = run.config.data.length, data.partition(":")
    if kind == "prepared":
        return batches.open_split(storage.directory(argument), split, length, tokenizer=run.tokenizer)
    corpus = corpora.find(data)
    if split not in corpus.splits:
        remedy = f"choose one of {', '.join(corpus.splits)}"
        raise errors.UserError(f"has no split {split!r}", field="data", value=data, remedy=remedy)
    corpus = dataclasses.replace(corpus, splits=(split,))
    shards.pack(corpus, run.tokenizer, scratch, source=data, tokenizer_spec=run.config.data.tokenizer)
    return batches.open_split(scratch, split, length)


def _passes(
    opened: runs.OpenRun, sequences: Integer[np.ndarray, "S L"], settings: Settings, name: str
) -> list[likelihoods.Pass]:
    """All passes that are needed: those that the run directory holds, and new ones, which are kept there."""
    run = opened.run
    done = [likelihoods.Pass(**part) for part in results.read_parts(run, name)]
    values_fn = likelihoods.make_values_fn(run, with_reconstruction=settings.protocol == "strict")
    with terminals.progress() as report:

        def share(number: int, part: float) -> None:
            expected = max(_num_times(settings, done), number + 1)
            report("bounds", (number + part) / expected, round((number + part) * sequences.size))

        drawn = likelihoods.passes(
            functools.partial(values_fn, opened.model),
            sequences,
            batch_size=settings.batch_size,
            seed=settings.seed,
            first=len(done),
            is_exact=run.is_autoregressive,
            report=share,
        )
        while len(done) < _num_times(settings, done):
            done.append(next(drawn))
            results.write_parts(run, name, [found._asdict() for found in done])
    return done[: settings.num_times]


def _num_times(settings: Settings, done: Sequence[likelihoods.Pass]) -> int:
    """Number of passes that are needed, estimated from those done so far."""
    if settings.num_times is not None:
        return settings.num_times
    if not done:
        return 1
    stderr = max(estimate.stderr for estimate in likelihoods.combine(done)[:2])
    if stderr <= settings.target_stderr:
        return len(done)
    return min(_MAX_TIMES, max(len(done) + 1, math.ceil(len(done) * min(1e6, stderr / settings.target_stderr) ** 2)))


def _figures(
    run: runs.Run, text: batches.PackedSplit, settings: Settings, done: Sequence[likelihoods.Pass]
) -> dict[str, Any]:
    estimates = likelihoods.combine(done)
    bounds = likelihoods.named_bounds(run, estimates)
    figures: dict[str, Any] = {}
    if settings.protocol == "strict":
        prior, reconstruction = likelihoods.prior(run.process), estimates[2]
        figures["prior_nats_per_token"] = prior
        figures["reconstruction_nats_per_token"] = reconstruction.mean
        figures["reconstruction_nats_per_token_stderr"] = reconstruction.stderr
        for name, bound in bounds.items():
            # The mean over [T_MIN, 1] times the width is the integral; the terms at its ends are added.
            mean, stderr = bound.mean * (1 - losses.T_MIN), bound.stderr * (1 - losses.T_MIN)
            figures[f"{name}_integral_nats_per_token"] = mean
            bounds[name] = likelihoods.Estimate(
                mean + prior + reconstruction.mean, math.hypot(stderr, reconstruction.stderr)
            )
    for name, bound in bounds.items():
        bits = 1 / (math.log(2) * text.characters_per_token)
        if not bound.mean < 700:
            raise errors.UserError(
                f"has a {name} of {bound.mean:.6g} nats per token, too much for a perplexity to be a number",
                field="workdir",
                value=run.workdir,
                remedy="train it again",
            )
        ppl_bound, nats_per_word = math.exp(bound.mean), bound.mean / text.words_per_token
        # Where text has almost no spaces, words are so long that no float holds their perplexity.
        per_word = math.exp(nats_per_word) if nats_per_word < 700 else None
        figures[name] = {
            "nats_per_token": bound.mean,
            "nats_per_token_stderr": bound.stderr,
            "bits_per_character": bound.mean * bits,
            "bits_per_character_stderr": bound.stderr * bits,
            "ppl_bound": ppl_bound,
            "ppl_bound_stderr": ppl_bound * bound.stderr,
            "ppl_bound_per_word": per_word,
            "ppl_bound_per_word_stderr": None if per_word is None else per_word * bound.stderr / text.words_per_token,
        }
    if run.tokenizer.unit == "character":
        known = batches.entropies(text.tokens.read(0, text.num_tokens), run.graph.num_states)
        figures["unigram_entropy_bits"], figures["bigram_entropy_bits"] = known
    return figures


def table(result: dict[str, Any]) -> tables.Table:
    """The result of `evaluate` as a table."""
    times = f"{result['num_times']} times each, t in [1e-3, 1], {result['protocol']} protocol, "
    times = "" if result["protocol"] == "exact" else times
    head = [
        f"{result['workdir']}  step {result['step']}  {result['source']} {result['split']}",
        f"{result['num_sequences']} sequences of {result['length']} tokens, {times}{result['dtype']}",
    ]
    rows, notes = [], []
    for name in (name for name in likelihoods.BOUNDS if name in result):
        title = "exact" if name == "negative_log_likelihood" else name.replace("_", "-")
        cells = []
        for figure, most_digits in (
            ("nats_per_token", 4),
            ("bits_per_character", 4),
            ("ppl_bound", 3),
            ("ppl_bound_per_word", 3),
        ):
            value, stderr = result[name][figure], result[name][f"{figure}_stderr"]
            digits = most_digits if value is None or value < 1000 else 0
            cells.append("no figure" if value is None else tables.estimate(value, stderr, digits))
        rows.append((title, *cells))
    if "score_entropy" in result and "cross_entropy" not in result:
        notes.append("cross-entropy   not defined for the uniform graph, whose ratios have no known sum")
    if result["protocol"] == "strict":
        notes.append(
            f"in them, in nats/token: prior {result['prior_nats_per_token']:.4f}, reconstruction "
            f"{result['reconstruction_nats_per_token']:.4f} ± {result['reconstruction_nats_per_token_stderr']:.4f}"
        )
    if "bigram_entropy_bits" in result:
        notes.append(
            f"own entropy of this text in bits/character: {result['unigram_entropy_bits']:.4f} unigram, "
            f"{result['bigram_entropy_bits']:.4f} bigram (given the one before)"
        )
    columns = ("bound", "nats/token", "bits/character", "ppl_bound", "ppl_bound per word")
    return tables.Table(head=head, columns=columns, rows=rows, notes=notes)
