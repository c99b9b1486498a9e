"""Frontiers: what a judge thinks of samples, against their entropy, over temperature and nucleus.

Perplexity falls with the temperature, and entropy with it, so one point ranks no models. The curve of all points does
(arXiv 2604.02718): KL(samples || judge) is the judge's cross-entropy minus the entropy of the samples' distribution.
That entropy is not known. The mean unigram entropy of the samples stands for it, as in that note. It is larger, since
it knows no order, so the difference is too small by as much as order tells. Compare it with that of held-out text.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from sedd_jax import runs
from sedd_jax.evaluation import generation_quality, judges, quality_curves, results, tables
from sedd_jax.model import sampling_config
from sedd_jax.runtime import errors, processes, storage

_STYLES = {"temperature": ("solid", "o"), "top_p": ("dashed", "s")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frontier:
    """What is varied: one of both at a time, the other is 1. The point where both are 1 is always there.

    Attributes:
        temperatures: temperatures.
        top_ps: shares of the nucleus.
    """

    temperatures: Sequence[float] = ()
    top_ps: Sequence[float] = ()

    def points(self) -> list[dict[str, float]]:
        """The settings of each point, from both ends to 1."""
        plain = {"temperature": 1.0, "top_p": 1.0}
        found = [plain | {"temperature": x} for x in self.temperatures] + [plain | {"top_p": x} for x in self.top_ps]
        return [*(point for point in found if point != plain), plain]


def measure(
    workdir: storage.Directory,
    judge: str,
    frontier: Frontier,
    *,
    beside: Sequence[storage.Directory] = (),
    step: int | None = None,
    samples: generation_quality.Samples = generation_quality.SAMPLES,
    **settings: Any,
) -> dict[str, Any]:
    """Measures samples of one or several runs at every point, as `generation_quality.read` does, with precise draws.

    Finished points are kept.

    Args:
        workdir: the run directory; it gets the result, and a picture.
        judge: see `judges.open_judge`.
        frontier: temperatures and nuclei.
        beside: other runs, each with its newest checkpoint.
        step: the run's checkpoint; the newest if None.
        samples: how many samples at each point.
        **settings: fields of `config.SamplingConfig` that differ from each run's at every point.

    Returns:
        `runs`, each with its `points` and the same figures of its held-out text.

    Raises:
        errors.UserError: where a point is impossible.
    """
    reader, home = judges.open_judge(judge), runs.load(workdir)
    every = [home, *(runs.load(other, field="beside") for other in beside)]
    found = [_of_run(each, home, reader, frontier, samples, step if each is home else None, settings) for each in every]
    of_home = next(of_run for of_run in found if of_run["workdir"] == str(home.workdir))
    result = {
        **{key: of_home[key] for key in ("workdir", "step", "dtype", "device", "versions")},
        "judge": reader.name,
        "num_samples": samples.num_samples,
        "seed": samples.seed,
        "runs": found,
    }
    name = results.name("frontier", result)
    result["picture"] = f"{name}.png"
    if processes.is_first():
        with results.keeping():
            plot(result, results.path(home, result["picture"]))
    results.keep(home, name, result)
    return result


def _of_run(
    run: runs.Run,
    home: runs.Run,
    judge: judges.Judge,
    frontier: Frontier,
    samples: generation_quality.Samples,
    step: int | None,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """The points of one run; those that are done are read from `home`."""
    wanted = frontier.points()
    # A point has its own temperature and nucleus, whatever the run's config says.
    fixed = {"draw": "precise", **settings, "num_samples": samples.batch_size}
    samplings = [run.sampling(**fixed, **point) for point in wanted]
    opened = run.restore(step)
    real, sha256 = generation_quality.held_out(run, samples.num_samples, samples.seed)
    common = {
        **results.circumstances(opened),
        **generation_quality.described(run, samplings[-1]),
        "judge": judge.name,
        "length": run.config.data.length,
        "data_sha256": sha256,
        "num_samples": samples.num_samples,
        "batch_size": samples.batch_size,
        "seed": samples.seed,
        "held_out": generation_quality.read(run, judge, real),
    }
    parts = results.name("frontier_points", common)
    done = results.read_parts(home, parts, generation_quality.FIGURES)
    for point, sampling in zip(wanted, samplings, strict=True):
        if not any(_is_of(part, point) for part in done):
            drawn = generation_quality.draw(opened, sampling, samples.num_samples, samples.seed)
            done.append({**point, **generation_quality.read(run, judge, drawn)})
            results.write_parts(home, parts, done)
    return {**common, "points": [next(part for part in done if _is_of(part, point)) for point in wanted]}


def _is_of(part: dict[str, Any], point: dict[str, float]) -> bool:
    return all(part.get(key) == value for key, value in point.items())


def _varied(point: dict[str, float]) -> dict[str, float]:
    """The settings of a point that are not 1."""
    return {name: value for name, value in point.items() if value != sampling_config.REFINEMENTS[name]}


def table(result: dict[str, Any]) -> tables.Table:
    """The result of `measure` as a table, with a row for each point."""
    cells = lambda found: (
        tables.estimate(found["gen_ppl_pooled"], digits=2),
        tables.estimate(found["cross_entropy"], found["cross_entropy_stderr"]),
        tables.estimate(found["unigram_entropy"], found["unigram_entropy_stderr"]),
        tables.estimate(found["divergence"], found["divergence_stderr"]),
    )
    rows = []
    hows = [generation_quality.how(of_run) for of_run in result["runs"]]
    for of_run, how in zip(result["runs"], hows, strict=True):
        own = "" if len(set(hows)) == 1 else f" ({how})"
        rows += [(f"{of_run['workdir']}{own}, {_title(point)}", *cells(point)) for point in of_run["points"]]
        rows.append((f"{of_run['workdir']}, held-out text", *cells(of_run["held_out"])))
    how = hows[0] if len(set(hows)) == 1 else "each run drawn as said"
    return tables.Table(
        head=[
            f"{result['num_samples']} samples a point, {how}, {result['dtype']}",
            f"read by {result['judge']}; nats per token of the run",
        ],
        columns=("", "perplexity, pooled", "cross-entropy", "unigram entropy", "difference"),
        rows=rows,
        notes=[
            "the difference stands for KL(samples || judge); it is too small, alike for texts that are alike: compare "
            "it with that of held-out text",
            f"drawn in {results.DIRECTORY}/{result['picture']} of the run",
        ],
    )


def _title(point: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in _varied(_settings(point)).items()) or "as trained"


def _settings(point: dict[str, Any]) -> dict[str, float]:
    return {name: point[name] for name in _STYLES}


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
    """Draws the judge's cross-entropy against unigram entropy into a PNG file: right and below is better."""
    from matplotlib import figure

    picture = figure.Figure(figsize=(9, 6), dpi=150, layout="constrained")
    axes = picture.subplots()
    for number, of_run in enumerate(result["runs"]):
        color = quality_curves.COLORS[number % len(quality_curves.COLORS)]
        for varied, (line, marker) in _STYLES.items():
            points = sorted(
                (point for point in of_run["points"] if set(_varied(_settings(point))) <= {varied}),
                key=lambda point: point[varied],
            )
            if len(points) > 1 or varied == "temperature":
                axes.errorbar(
                    [point["unigram_entropy"] for point in points],
                    [point["cross_entropy"] for point in points],
                    xerr=[point["unigram_entropy_stderr"] or 0.0 for point in points],
                    yerr=[point["cross_entropy_stderr"] or 0.0 for point in points],
                    label=f"{of_run['workdir']}, {varied}",
                    color=color,
                    linestyle=line,
                    marker=marker,
                    capsize=3,
                )
                for point in points:
                    at = point["unigram_entropy"], point["cross_entropy"]
                    axes.annotate(f"{point[varied]:g}", at, xytext=(5, -11), textcoords="offset points", fontsize=8)
        real = of_run["held_out"]
        axes.plot(
            real["unigram_entropy"], real["cross_entropy"], "*", color=color, ms=13, label=f"{of_run['workdir']}, text"
        )
    axes.set(
        xlabel="unigram entropy of a sample, nats per token",
        ylabel="the judge's cross-entropy, nats per token",
        title="Quality against entropy: right and below is better",
    )
    quality_curves.save(picture, path)


def parse(text: str) -> Frontier:
    """The frontier of a text such as temperature:0.7,0.85/top_p:0.9,0.95.

    Raises:
        errors.UserError: if it is none.
    """
    found: dict[str, list[float]] = {}
    try:
        for part in text.split("/"):
            kind, _, numbers = part.partition(":")
            found.setdefault(kind, []).extend(float(number) for number in numbers.split(","))
    except ValueError:
        found = {}
    if not found or not set(found) <= set(_STYLES):
        raise errors.UserError(
            "is no list of temperatures or nuclei",
            field="frontier",
            value=text,
            remedy="give one such as temperature:0.7,0.85,1 or top_p:0.9,0.95 or both, with a / between them",
        )
    return Frontier(temperatures=found.get("temperature", ()), top_ps=found.get("top_p", ()))
