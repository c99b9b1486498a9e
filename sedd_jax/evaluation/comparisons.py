"""The difference of two runs' bounds on the same text, with an error of its own."""

import pathlib
import tempfile
from typing import Any

from sedd_jax import runs
from sedd_jax.bounds import likelihoods
from sedd_jax.evaluation import perplexity, results, tables
from sedd_jax.runtime import errors, storage, terminals

_TITLES = {"negative_log_likelihood": "exact", "score_entropy": "score-entropy", "cross_entropy": "cross-entropy"}


def measure(
    workdir: storage.Directory,
    against: str,
    *,
    data: str | None = None,
    split: str | None = None,
    step: int | None = None,
    settings: perplexity.Settings | None = None,
) -> dict[str, Any]:
    """Bounds of two runs on the same sequences, at the same times and with the same random numbers.

    What both find hard at the same draw cancels in the difference. So its error is smaller than that of either bound,
    and passes go on until it is small enough. Each run keeps its passes, as `perplexity.evaluate` does.

    Args:
        workdir: the run directory.
        against: the other run's directory, whose newest checkpoint is taken.
        data: see `perplexity.evaluate`; the first run's own text if None.
        split: see `perplexity.evaluate`.
        step: the first run's checkpoint; the newest if None.
        settings: how to estimate the bounds; the target is the standard error of the difference.

    Returns:
        `bounds`: for each pair of bounds both values, their difference (first minus second) in nats per token, its
        standard error, the degrees of freedom of that, and half the width of its 95 % interval.

    Raises:
        errors.UserError: where the runs do not read the same tokens.
    """
    settings = settings or perplexity.Settings()
    run, other = runs.load(workdir), runs.load(storage.directory(against), field="against")
    _check(run, other)
    split = split or ("valid" if data is None else "test")
    with tempfile.TemporaryDirectory() as scratch:
        text = perplexity.open_text(run, data, split, pathlib.Path(scratch))
        opened = (run.restore(step), other.restore())
        sides = [perplexity.Kept(one, text, split, settings) for one in opened]
        with terminals.progress() as report:
            _draw(sides, settings, report)
    differences = _differences(sides)
    result = {
        **results.circumstances(sides[0].opened),
        **sides[0].drawn,
        "protocol": settings.protocol,
        "against": str(other.workdir),
        "against_step": sides[1].opened.step,
        "source": data or run.config.data.source,
        "num_sequences": text.num_sequences,
        "num_times": len(differences),
        "characters_per_token": text.characters_per_token,
        "bounds": _rows(sides, differences),
    }
    drawn = [{**side.drawn, "name": side.name, "workdir": str(side.opened.run.workdir)} for side in sides]
    results.keep(run, results.name("comparison", {"drawn": drawn, "num_times": len(differences)}), result)
    return result


def _check(run: runs.Run, other: runs.Run) -> None:
    length, its_length = run.config.data.length, other.config.data.length
    is_same = run.tokenizer.fingerprint() == other.tokenizer.fingerprint()
    if not is_same or length != its_length:
        what = f"sequences of {its_length} tokens, and this run {length}" if is_same else "another tokenizer"
        raise errors.UserError(
            f"has {what}, so the two do not read the same tokens",
            field="against",
            value=other.workdir,
            remedy="compare a run of the same tokenizer and length",
        )


def _draw(sides: list[perplexity.Kept], settings: perplexity.Settings, report: terminals.Report) -> None:
    """Draws as many passes of each run as the difference needs."""
    number = needed = settings.num_times or 2
    while True:
        for side in sides:
            before = sum(len(one.done) for one in sides if one is not side)
            while len(side.done) < (1 if side.opened.run.is_autoregressive else number):
                side.draw(report, of=max(len(sides) * needed, before + len(side.done) + 1), before=before)
        if settings.num_times is not None:
            return
        done = _differences(sides)
        needed = likelihoods.num_passes(done, settings.target_stderr, most=perplexity.MAX_TIMES)
        if needed <= len(done):
            return
        number = len(done) + 1


def _differences(sides: list[perplexity.Kept]) -> list[likelihoods.Pass]:
    """Passes that both runs have, as their difference."""
    return likelihoods.difference(*_common(sides))


def _common(sides: list[perplexity.Kept]) -> list[list[likelihoods.Pass]]:
    random = [len(side.done) for side in sides if not side.opened.run.is_autoregressive]
    limits = [side.settings.num_times for side in sides if not side.opened.run.is_autoregressive]
    number = min([1] if not random else [*random, *(limit for limit in limits if limit is not None)])
    return [side.totals(side.done[:number]) for side in sides]


def _rows(sides: list[perplexity.Kept], differences: list[likelihoods.Pass]) -> list[dict[str, Any]]:
    """A row for the score-entropy bounds, and one for the tightest of each run where that is another."""
    values = [likelihoods.combine(done) for done in _common(sides)]
    named = [likelihoods.named_bounds(side.opened.run, found) for side, found in zip(sides, values, strict=True)]
    names = [(next(iter(found)), list(found)[-1]) for found in named]
    rows = []
    for which, difference in enumerate(likelihoods.combine(differences)):
        bounds = (names[0][which], names[1][which])
        if bounds in [row["names"] for row in rows]:
            continue
        rows.append(
            {
                "names": bounds,
                "nats_per_token": values[0][which].mean,
                "against_nats_per_token": values[1][which].mean,
                "difference": difference.mean,
                "difference_stderr": perplexity.known(difference.stderr),
                "half_width": perplexity.known(difference.half_width),
                "stderr_freedom": difference.freedom,
            }
        )
    return rows


def table(result: dict[str, Any]) -> tables.Table:
    """The result of `measure` as a table."""
    rows = []
    for row in result["bounds"]:
        ours, its = (_TITLES[name] for name in row["names"])
        low, high = (
            (row["difference"] + sign * row["half_width"] for sign in (-1, 1))
            if row["half_width"] is not None
            else (None, None)
        )
        rows.append(
            (
                ours if ours == its else f"{ours}, against {its}",
                f"{row['nats_per_token']:.4f}",
                f"{row['against_nats_per_token']:.4f}",
                tables.estimate(row["difference"], row["difference_stderr"], 4),
                "unknown" if low is None else f"{low:.4f} to {high:.4f}",
            )
        )
    freedom = result["bounds"][0]["stderr_freedom"]
    return tables.Table(
        head=[
            f"{result['workdir']}  step {result['step']}  against {result['against']}  step {result['against_step']}",
            f"{result['source']} {result['split']}, {result['num_sequences']} sequences of {result['length']} tokens, "
            f"{result['num_times']} times each, {result['protocol']} protocol, {result['dtype']}",
        ],
        columns=("bound, nats/token", "this run", "the other", "difference", "95 % interval"),
        rows=rows,
        notes=[
            "paired: the same sequences, times and random numbers for both; below 0 this run is better",
            f"± is the standard error of the difference over times and noise ({freedom} degrees of freedom)",
        ],
    )
