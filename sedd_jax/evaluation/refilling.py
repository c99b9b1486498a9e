"""Infilling of held-out text: exact match, perplexity under a judge, and MAUVE (Lou et al. 2023, table 5)."""

import re
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from sedd_jax import runs
from sedd_jax.evaluation import generation_quality, judges, results, tables
from sedd_jax.runtime import errors, storage

# The paper's patterns: of 100 tokens the first and the last 25 are given, or the first 50 as a prompt.
PRESETS = {"paper": "25{50}25", "prompt": "50{50}"}
# A number of more digits is longer than any sequence, and no part.
_PART = re.compile(r"\{(\d{1,7})\}|(?<!\d)(\d{1,7})(?!\d)")
_WINDOWS_FOR_MAUVE = 1000  # as published; with a few hundred MAUVE cannot tell texts apart


def measure(
    workdir: storage.Directory,
    pattern: str,
    *,
    judge: str | None = None,
    step: int | None = None,
    samples: generation_quality.Samples = generation_quality.SAMPLES,
    num_draws: int = 1,
    **settings: Any,
) -> dict[str, Any]:
    """Removes gaps from windows of held-out text and fills them again.

    Args:
        workdir: the run directory.
        pattern: one of `PRESETS`, or numbers of known and {missing} tokens in order, such as 25{50}25.
        judge: see `judges.open_judge`; without one there is neither perplexity nor MAUVE.
        step: the run's checkpoint; the newest if None.
        samples: how many windows.
        num_draws: how often each window is refilled; the paper refills 1000 windows 5 times.
        **settings: fields of `config.SamplingConfig` that differ from the run's: sampler, num_steps, draw.

    Returns:
        `tokens_matched`, the share of missing tokens that are filled as in the text; `tokens_matched_by_chance`, the
        share that another window has in the same place, None if there is no other; `windows_matched`, the share of
        windows that match as a whole. With a judge, also the figures of `generation_quality.read` for `refilled` and
        `held_out` windows, and `mauve`, or in `without_mauve` the reason why there is none.

    Raises:
        errors.UserError: where the pattern is not one, or is longer than the run's sequences.
    """
    run = runs.load(workdir)
    is_given = parse(pattern)
    length = run.config.data.length
    if len(is_given) > length:
        raise errors.UserError(
            f"takes {len(is_given)} tokens, the run's sequences have {length}",
            field="infill",
            value=pattern,
            remedy="give another pattern",
        )
    reader = None if judge is None else judges.open_judge(judge)
    sampling = run.sampling(num_samples=samples.batch_size, **settings)
    opened = run.restore(step)
    real, sha256 = generation_quality.held_out(run, samples.num_samples, samples.seed)
    # The model knows only its full length. So what follows the window is a gap, too, which is cut off afterwards.
    known = np.pad(is_given, (0, length - len(is_given)))
    result = {
        **results.circumstances(opened),
        "judge": None if reader is None else reader.name,
        "pattern": PRESETS.get(pattern, pattern),
        "data_sha256": sha256,
        "num_samples": len(real),
        "num_draws": num_draws,
        **generation_quality.described(run, sampling, int((~known).sum())),
        "batch_size": samples.batch_size,
        "seed": samples.seed,
    }
    name = results.name("infilling", result)
    # Scored before anything is drawn, in case the judge cannot read this text.
    held_out = None if reader is None else generation_quality.read(run, reader, real[:, : len(is_given)])
    known = np.broadcast_to(known, real.shape)
    draws = [
        generation_quality.fill(opened, sampling, real, known, samples.seed * num_draws + draw)[:, : len(is_given)]
        for draw in range(num_draws)
    ]
    real = real[:, : len(is_given)]
    matched = np.stack([(filled == real)[:, ~is_given] for filled in draws])
    # Draws of the same window are not independent, so standard errors count each window once.
    result |= _share("tokens_matched", matched.mean(axis=(0, 2)))
    by_chance = (real == np.roll(real, 1, axis=0))[:, ~is_given].mean()
    result["tokens_matched_by_chance"] = float(by_chance) if len(real) > 1 else None
    result |= _share("windows_matched", matched.all(axis=2).mean(axis=0))
    if reader is not None:
        result["refilled"] = generation_quality.read(run, reader, np.concatenate(draws), num_draws)
        result["held_out"] = held_out
        result |= _mauve(run, reader, real, draws)
    result["texts"] = [_shown(run, row, is_given) for row in draws[0][: results.KEPT_TEXTS]]
    results.keep(run, name, result)
    return result


def parse(pattern: str) -> Bool[np.ndarray, "W"]:
    """Which tokens of a window are given, by a pattern.

    Raises:
        errors.UserError: where the text is not a pattern, or nothing is missing.
    """
    text = PRESETS.get(pattern, pattern)
    parts = [(not gap, int(gap or given)) for gap, given in _PART.findall(text)]
    if _PART.sub("", text) or all(is_given or not count for is_given, count in parts):
        raise errors.UserError(
            "is not a pattern",
            field="infill",
            value=pattern,
            remedy="give numbers of known and {missing} tokens, such as 25{50}25, or one of " + ", ".join(PRESETS),
        )
    return np.concatenate([np.full(count, is_given) for is_given, count in parts])


def table(result: dict[str, Any]) -> tables.Table:
    """The result of `measure` as a table."""
    times = f", {result['num_draws']} times each" if result["num_draws"] > 1 else ""
    head = [
        f"{result['workdir']}  step {result['step']}  {result['num_samples']} windows {result['pattern']}{times}, "
        f"{generation_quality.how(result)}, {result['dtype']}"
    ]
    rows = [
        ("missing tokens that come back", generation_quality.cell(result, "tokens_matched"), ""),
        ("the same in another window", generation_quality.cell(result, "tokens_matched_by_chance"), ""),
        ("windows that come back whole", generation_quality.cell(result, "windows_matched"), ""),
    ]
    notes = []
    if result["judge"] is not None:
        head.append(f"read by {result['judge']}")
        refilled, real = result["refilled"], result["held_out"]
        rows += [
            (title, generation_quality.cell(refilled, name), generation_quality.cell(real, name))
            for name, title in (
                ("gen_ppl_per_sequence", "perplexity of the whole, mean of windows"),
                ("gen_ppl_pooled", "perplexity of the whole, pooled over tokens"),
                ("unigram_entropy", "unigram entropy, nats"),
            )
        ]
        if "mauve" in result:
            rows.append(("MAUVE", generation_quality.cell(result, "mauve"), ""))
        else:
            notes.append(f"no MAUVE: {result['without_mauve']}")
        notes += generation_quality.warnings(refilled, real)
    return tables.Table(head=head, columns=("", "refilled", "held-out text"), rows=rows, notes=notes)


def _mauve(
    run: runs.Run, judge: judges.Judge, real: Int[np.ndarray, "S W"], draws: list[Int[np.ndarray, "S W"]]
) -> dict[str, Any]:
    """MAUVE (Pillutla et al. 2021) of each draw's windows against the real ones, with features of the judge."""
    if len(real) < _WINDOWS_FOR_MAUVE:
        return {"without_mauve": f"it takes {_WINDOWS_FOR_MAUVE} windows (--num_samples)"}
    try:
        import mauve
    except ImportError:
        return {"without_mauve": "mauve-text is missing: pip install 'sedd_jax[mauve]'"}
    features = lambda rows: judge.features(judge.tokens(run, rows))
    of_real = features(real)
    found = [mauve.compute_mauve(p_features=of_real, q_features=features(filled)).mauve for filled in draws]
    return _share("mauve", np.array(found, np.float64))


def _share(name: str, values: Float[np.ndarray, "S"]) -> dict[str, Any]:
    return {name: float(values.mean()), f"{name}_stderr": generation_quality.stderr(values)}


def _shown(run: runs.Run, row: Int[np.ndarray, "W"], is_given: Bool[np.ndarray, "W"]) -> str:
    """A window's text, with what was filled in brackets."""
    edges = np.flatnonzero(np.diff(is_given)) + 1
    pieces = zip(np.split(row, edges), np.split(is_given, edges), strict=True)
    return "".join(
        run.tokenizer.decode(part) if known[0] else f"[{run.tokenizer.decode(part)}]" for part, known in pieces
    )
