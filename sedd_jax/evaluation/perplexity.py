"""Perplexity: bounds on the likelihood of a run's held-out text, or of other text."""

import dataclasses
import functools
import math
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from sedd_jax import runs
from sedd_jax.bounds import likelihoods
from sedd_jax.data import batches, corpora, shards
from sedd_jax.diffusion import time_laws
from sedd_jax.evaluation import results, tables
from sedd_jax.runtime import errors, sharding, storage, terminals

PROTOCOLS = ("published", "strict")
MAX_TIMES = 1000


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
        likelihoods.check(self.num_times, self.target_stderr, self.batch_size)


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
    with tempfile.TemporaryDirectory() as scratch:
        split = split or ("valid" if data is None else "test")
        text = open_text(run, data, split, pathlib.Path(scratch))
        kept = Kept(run.restore(step), text, split, settings)
        with terminals.progress() as report:
            while len(kept.done) < (needed := _num_times(kept)):
                kept.draw(report, of=needed)
    done = kept.done[: settings.num_times]
    result = {
        **results.circumstances(kept.opened),
        **kept.drawn,
        "source": data or run.config.data.source,
        "num_sequences": text.num_sequences,
        "left_out_tokens": text.num_tokens - text.num_sequences * text.length,
        "num_times": len(done),
        "characters_per_token": text.characters_per_token,
        "words_per_token": text.words_per_token,
        **_figures(kept, done),
    }
    results.keep(run, kept.name, result)
    return result


def open_text(run: runs.Run, data: str | None, split: str, scratch: pathlib.Path) -> batches.PackedSplit:
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


class Kept:
    """Passes of a run over a text, which its directory keeps.

    Attributes:
        opened: the run.
        text: the text.
        settings: how to estimate the bounds. One pass is all for the autoregressive baseline, whose value depends on
            neither time nor noise.
        drawn: all that a pass is a function of.
        name: under which passes are kept.
        done: passes so far, those that were kept before among them.
    """

    def __init__(self, opened: runs.OpenRun, text: batches.PackedSplit, split: str, settings: Settings):
        self.opened, self.text = opened, text
        is_exact = opened.run.is_autoregressive
        self.settings = dataclasses.replace(settings, protocol="published", num_times=1) if is_exact else settings
        self.drawn = {"step": opened.step, "checksum": opened.checksum, "split": split}
        self.drawn |= {"data_sha256": text.sha256, "length": text.length}
        self.drawn |= {"protocol": "exact" if is_exact else settings.protocol}
        self.drawn |= {"seed": settings.seed, "batch_size": settings.batch_size}
        with opened.on_devices():
            where = {"devices": sharding.num_batch_devices(), "groups": likelihoods.MOST_GROUPS}
        self.name = results.name("likelihood", self.drawn | where)
        fields = likelihoods.Pass._fields
        kept = results.read_parts(opened.run, self.name, fields)
        self.done = [likelihoods.Pass(*(part[field] for field in fields)) for part in kept]
        self._values_fn = likelihoods.make_values_fn(opened.run, with_reconstruction=self.settings.protocol == "strict")

    def draw(self, report: terminals.Report, *, of: int, before: int = 0) -> None:
        """Draws one more pass and keeps it.

        Args:
            report: shows progress.
            of: passes that are expected, of all runs.
            before: passes that other runs have drawn.
        """
        run, sequences, first = self.opened.run, self.text.sequences(), len(self.done)
        whole = lambda number, part: before + number + part
        share = lambda number, part: report(
            "bounds", whole(number, part) / of, round(whole(number, part) * sequences.size)
        )
        with self.opened.on_devices():
            drawn = likelihoods.passes(
                functools.partial(self._values_fn, self.opened.model),
                sequences,
                batch_size=self.settings.batch_size,
                seed=self.settings.seed,
                first=first,
                is_exact=run.is_autoregressive,
                report=share,
            )
            self.done.append(next(drawn))
        results.write_parts(run, self.name, [found._asdict() for found in self.done])

    def totals(self, done: Sequence[likelihoods.Pass]) -> list[likelihoods.Pass]:
        """Passes of both bounds by the protocol. The strict one adds the terms at the ends to the integral."""
        if self.settings.protocol != "strict":
            return [found._replace(groups=found.groups[:2]) for found in done]
        prior = likelihoods.prior(self.opened.run.process)
        totals = []
        for found in done:
            *bounds, reconstruction = np.array(found.groups)
            # The mean over [T_MIN, 1] times the width is the integral.
            total = np.stack(bounds) * (1 - time_laws.T_MIN) + (reconstruction + prior / len(reconstruction))[None]
            totals.append(found._replace(groups=total.tolist()))
        return totals


def _num_times(kept: Kept) -> int:
    """Number of passes that are needed, estimated from those done so far."""
    settings = kept.settings
    if settings.num_times is not None:
        return settings.num_times
    return likelihoods.num_passes(kept.totals(kept.done), settings.target_stderr, most=MAX_TIMES)


def _figures(kept: Kept, done: Sequence[likelihoods.Pass]) -> dict[str, Any]:
    run, text = kept.opened.run, kept.text
    bounds = likelihoods.named_bounds(run, likelihoods.combine(kept.totals(done)))
    figures: dict[str, Any] = {"stderr_freedom": next(iter(bounds.values())).freedom}
    if kept.settings.protocol == "strict":
        *integrals, reconstruction = likelihoods.combine(done)
        figures["prior_nats_per_token"] = likelihoods.prior(run.process)
        figures["reconstruction_nats_per_token"] = reconstruction.mean
        figures["reconstruction_nats_per_token_stderr"] = known(reconstruction.stderr)
        for name, integral in zip(bounds, integrals, strict=False):
            figures[f"{name}_integral_nats_per_token"] = integral.mean * (1 - time_laws.T_MIN)
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
            "nats_per_token_stderr": known(bound.stderr),
            "bits_per_character": bound.mean * bits,
            "bits_per_character_stderr": known(bound.stderr * bits),
            "ppl_bound": ppl_bound,
            "ppl_bound_stderr": known(ppl_bound * bound.stderr),
            "ppl_bound_per_word": per_word,
            "ppl_bound_per_word_stderr": per_word and known(per_word * bound.stderr / text.words_per_token),
        }
    if run.tokenizer.unit == "character":
        entropies = batches.entropies(text.tokens.read(0, text.num_tokens), run.graph.num_states)
        figures["unigram_entropy_bits"], figures["bigram_entropy_bits"] = entropies
    return figures


def known(stderr: float) -> float | None:
    """A standard error as a result holds it: None where it is not known."""
    return stderr if math.isfinite(stderr) else None


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
        name = "reconstruction_nats_per_token"
        reconstruction = tables.estimate(result[name], result[f"{name}_stderr"], 4)
        notes.append(
            f"in them, in nats/token: prior {result['prior_nats_per_token']:.4f}, reconstruction {reconstruction}"
        )
    if "bigram_entropy_bits" in result:
        notes.append(
            f"own entropy of this text in bits/character: {result['unigram_entropy_bits']:.4f} unigram, "
            f"{result['bigram_entropy_bits']:.4f} bigram (given the one before)"
        )
    notes += _about_errors(result)
    columns = ("bound", "nats/token", "bits/character", "ppl_bound", "ppl_bound per word")
    return tables.Table(head=head, columns=columns, rows=rows, notes=notes)


def _about_errors(result: dict[str, Any]) -> list[str]:
    """What the errors of a result are, in words; nothing where it is exact."""
    if result["protocol"] == "exact":
        return []
    if "stderr_freedom" not in result:
        return ["± is an upper estimate of an earlier version, which counts differences between sequences as noise"]
    if not result["stderr_freedom"]:
        return ["one pass has no standard error: draw two times or more (--num_times)"]
    return [f"± is the standard error over times and noise ({result['stderr_freedom']} degrees of freedom)"]
