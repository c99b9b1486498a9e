"""Zero-shot perplexity on the sets of the paper's table 1 (Lou et al. 2023), beside the published figures."""

import dataclasses
import pathlib
from typing import Any

from sedd_jax import runs
from sedd_jax.data import corpora, shards
from sedd_jax.evaluation import perplexity, results, tables
from sedd_jax.runtime import errors, storage

# The sets in the paper's order. Of each the first split is measured that exists.
SETS = {
    "lambada": ("test",),
    "wikitext2": ("train", "test"),
    "ptb": ("test",),
    "wikitext103": ("test",),
    "lm1b": ("test",),
}
# Perplexities of GPT-2, bounds on those of the others, per GPT-2 token. Length 1024, 1000 times for each sequence.
PUBLISHED = {
    "GPT-2 small": (45.04, 42.43, 138.43, 41.60, 75.20),
    "SEDD absorb small": (50.92, 41.84, 114.24, 40.62, 79.29),
    "SEDD uniform small": (65.40, 50.27, 140.12, 49.60, 101.37),
    "D3PM small": (93.47, 77.28, 200.82, 75.16, 138.92),
    "PLAID small": (57.28, 51.80, 142.60, 50.86, 91.12),
    "GPT-2 medium": (35.66, 31.80, 123.14, 31.39, 55.72),
    "SEDD absorb medium": (42.77, 31.04, 87.12, 29.98, 61.19),
    "SEDD uniform medium": (51.28, 38.93, 102.28, 36.81, 79.12),
}


def evaluate_sets(
    workdir: storage.Directory,
    *,
    directory: str,
    step: int | None = None,
    settings: perplexity.Settings | None = None,
) -> dict[str, Any]:
    """Runs `perplexity.evaluate` on every set that can be read, and lists the others with the reason.

    Args:
        workdir: the run directory.
        directory: where prepared sets are, under their names; a set that is not there is fetched.
        step: the checkpoint; the newest if None.
        settings: how to estimate the bounds; the defaults if None.

    Returns:
        `sets`, the result of `perplexity.evaluate` for each set, and `missing`, why each of the others cannot be read.

    Raises:
        errors.UserError: where no set can be read.
    """
    found, missing = {}, {}
    for name in SETS:
        try:
            data, split = _find(name, directory)
            found[name] = perplexity.evaluate(workdir, data=data, split=split, step=step, settings=settings)
        except (errors.UserError, OSError) as error:
            missing[name] = " ".join(str(error).split())
    if not found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        raise errors.UserError(f"no set of the suite can be read: {reasons}")
    run, first = runs.load(workdir), next(iter(found.values()))
    same = ("workdir", "step", "checksum", "dtype", "device", "versions")
    result = {**{name: first[name] for name in same}, "sets": found, "missing": missing}
    measured = {
        "checksum": first["checksum"],
        **dataclasses.asdict(settings or perplexity.Settings()),
        "data_sha256": {name: one["data_sha256"] for name, one in found.items()},
    }
    results.keep(run, results.name("zero_shot", measured), result)
    return result


def _find(name: str, directory: str) -> tuple[str, str]:
    """The source of a set and the split to measure."""
    prepared = storage.directory(directory) / name
    if shards.is_packed(prepared):
        source, splits = f"prepared:{prepared}", shards.read_header(prepared)["splits"]
    else:
        source, splits = name, corpora.find(name).splits
    split = next((split for split in SETS[name] if split in splits), None)
    if split is None:
        raise errors.UserError(f"{source} has the splits {', '.join(splits)}, none of {', '.join(SETS[name])}")
    return source, split


def table(result: dict[str, Any]) -> tables.Table:
    """The paper's table with rows for this run's bounds, and the missing sets as notes."""
    found = next(iter(result["sets"].values()))
    measured = [result["sets"].get(name) for name in SETS]
    rows = [(title, *(f"{figure:.2f}" for figure in figures)) for title, figures in PUBLISHED.items()]
    name = f"{pathlib.PurePath(result['workdir']).name} step {result['step']}"
    for bound in ("cross_entropy", "score_entropy", "negative_log_likelihood"):
        if bound in found:
            cells = [
                tables.estimate(one[bound]["ppl_bound"], one[bound]["ppl_bound_stderr"], 2) if one else "missing"
                for one in measured
            ]
            rows.append((f"{name}, {bound.replace('_', '-')}", *cells))
    rows.append(("its split, times", *(f"{one['split']}, {one['num_times']}" if one else "" for one in measured)))
    return tables.Table(
        head=[
            f"zero-shot ppl_bound per token of {found['length']}, {found['protocol']} protocol; GPT-2 has perplexities"
        ],
        columns=("", *SETS),
        rows=rows,
        notes=[f"missing: {name}: {reason}" for name, reason in result["missing"].items()],
    )
