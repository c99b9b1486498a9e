"""Quality of samples against network evaluations (NFE), for each sampler, with precise and with published draws.

The published claims of fewer evaluations were made with float32 noise, which anneals (arXiv 2409.02908). So each point
is drawn both ways and comes with its entropy.
"""

import csv
import dataclasses
import io
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.evaluation import generation_quality, judges, results, tables
from sedd_jax.model import controls, sampling_config, score_draws
from sedd_jax.runtime import errors, processes, storage
from sedd_jax.sampling import generate

_FIGURES = ("gen_ppl_per_sequence", "gen_ppl_per_sequence_stderr", "gen_ppl_pooled", "unigram_entropy", "distinct_2")
# What the judge's own samples depend on, beside its settings. The figures of held-out text tell one judge from another.
_OF_JUDGE = ("judge", "length", "data_sha256", "num_samples", "batch_size", "seed", "dtype", "held_out")
COLORS = ("#1f5fae", "#d9480f", "#2b8a3e", "#862e9c", "#5c940d", "#0b7285")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """What is varied along a curve: every sampler takes every number of steps, or of network evaluations.

    Attributes:
        samplers: samplers by name.
        num_steps: numbers of reverse steps.
        num_evaluations: numbers of network evaluations, used where `num_steps` is empty. A sampler takes as many steps
            as they allow.
    """

    samplers: Sequence[str]
    num_steps: Sequence[int] = ()
    num_evaluations: Sequence[int] = ()


def measure(
    workdir: storage.Directory,
    judge: str,
    curve: Curve,
    *,
    step: int | None = None,
    samples: generation_quality.Samples = generation_quality.SAMPLES,
    **settings: Any,
) -> dict[str, Any]:
    """Measures samples at every point of a curve, as `generation_quality.read` does. Finished points are kept.

    Each point is drawn precisely and with published noise. Published draws have no controls such as a temperature; with
    one, all draws are precise.

    Args:
        workdir: the run directory.
        judge: see `judges.open_judge`.
        curve: samplers and numbers of steps.
        step: the run's checkpoint; the newest if None.
        samples: how many samples at each point.
        **settings: fields of `config.SamplingConfig` that differ from the run's at every point: those in
            `sampling_config.REFINEMENTS`.

    Returns:
        `points`, and the same figures of held-out text. If the judge is a run with the same tokens and length, also
        those of its own samples. A CSV file and a picture of the curve are kept beside the result in RUN/evaluations.

    Raises:
        errors.UserError: where the run is autoregressive, or a point is impossible.
    """
    run, reader = runs.load(workdir), judges.open_judge(judge)
    if run.is_autoregressive:
        raise errors.UserError(
            "is autoregressive, which takes a step for every token",
            field="workdir",
            value=workdir,
            remedy=f"measure it with {errors.name('generate')}",
        )
    common = _sampling(run, settings, sampler=curve.samplers[0], draw="precise")
    opened = run.restore(step)
    real, sha256 = generation_quality.held_out(run, samples.num_samples, samples.seed)
    result = {
        **results.circumstances(opened),
        "judge": reader.name,
        "length": run.config.data.length,
        "data_sha256": sha256,
        "num_samples": samples.num_samples,
        "batch_size": samples.batch_size,
        "seed": samples.seed,
        **sampling_config.refinements(common),
        # Part of the name of kept points: a judge that was trained again has the same name, but other figures.
        "held_out": generation_quality.read(run, reader, real),
    }
    is_controlled = sampling_config.make_control(common) != controls.Control()
    draws = ["precise"] if is_controlled else list(score_draws.DRAWS)
    wanted = [
        {"sampler": name, "draw": draw, "num_steps": steps}
        for name in curve.samplers
        for draw in draws
        for steps in curve.num_steps or [_steps_of(run, name, nfe, settings) for nfe in curve.num_evaluations]
    ]
    samplings = [_sampling(run, settings, num_samples=samples.batch_size, **point) for point in wanted]
    parts = results.name("curve_points", result)
    name = results.name("curve", {**result, "points": wanted})
    done = results.read_parts(run, parts, generation_quality.FIGURES)
    is_of = lambda part, point: all(part.get(key) == value for key, value in point.items())
    for point, sampling in zip(wanted, samplings, strict=True):
        if not any(is_of(part, point) for part in done):
            taken: list[int] = []
            drawn = generation_quality.draw(opened, sampling, samples.num_samples, samples.seed, count=taken.extend)
            is_adaptive = generation_quality.is_adaptive(sampling.sampler)
            done.append(
                {
                    **point,
                    "nfe": float(np.mean(taken)) if is_adaptive else generate.num_evaluations(run, sampling),
                    **generation_quality.read(run, reader, drawn),
                }
            )
            results.write_parts(run, parts, done)
    result["points"] = [next(part for part in done if is_of(part, point)) for point in wanted]
    result["judge_samples"] = _of_judge(run, reader, samples, result)
    result["picture"] = f"{name}.png"
    if processes.is_first():
        with results.keeping():
            _write_csv(result, results.path(run, f"{name}.csv"))
            plot(result, results.path(run, result["picture"]))
    results.keep(run, name, result)
    return result


def _sampling(run: runs.Run, settings: dict[str, Any], **point: Any) -> configs.SamplingConfig:
    """The sampling settings of a point; errors name the flags that a curve is given with."""
    try:
        return run.sampling(**settings, **point)
    except errors.UserError as error:
        fields = {"config.sampling.sampler": "samplers", "config.sampling.num_steps": "curve"}
        if error.field not in fields:
            raise
        value = f"steps:{error.value}" if fields[error.field] == "curve" else error.value
        raise errors.UserError(error.problem, field=fields[error.field], value=value, remedy=error.remedy) from error


def _steps_of(run: runs.Run, sampler: str, nfe: int, settings: dict[str, Any]) -> int:
    """The number of steps that a sampler takes with `nfe` network evaluations.

    Raises:
        errors.UserError: where they are too few for a single step.
    """
    nfe_of = lambda steps: generate.num_evaluations(
        run, _sampling(run, settings, sampler=sampler, draw="precise", num_steps=steps)
    )
    first, each = nfe_of(1), nfe_of(2) - nfe_of(1)
    if nfe < first:
        raise errors.UserError(
            f"is too few for {sampler}, which takes {first} for a step",
            field="curve",
            value=f"nfe:{nfe}",
            remedy="give more",
        )
    return 1 + (nfe - first) // each if each else 1  # More steps than tokens take no more evaluations.


def _of_judge(
    run: runs.Run, judge: judges.Judge, samples: generation_quality.Samples, common: dict[str, Any]
) -> dict[str, Any] | None:
    """Figures of the judge's own samples, a reference for the run's; None if it has other tokens or another length.

    They are drawn as the judge's own config says, which may anneal them, and kept.

    Args:
        run: the run.
        judge: the judge.
        samples: how many samples.
        common: what all points of the curve depend on.
    """
    if not isinstance(judge, judges.RunJudge) or judge.run.config.data.length != run.config.data.length:
        return None
    if judge.run.tokenizer.fingerprint() != run.tokenizer.fingerprint():
        return None
    sampling = judge.run.sampling(num_samples=samples.batch_size, draw="precise")
    how = {"nfe": run.config.data.length, **sampling_config.refinements(sampling)}
    name = results.name("curve_judge", {"common": {key: common[key] for key in _OF_JUDGE}, **how})
    done = results.read_parts(run, name, generation_quality.FIGURES)
    if not done:
        drawn = generation_quality.draw(judge.opened, sampling, samples.num_samples, samples.seed)
        done = [{**how, **generation_quality.read(run, judge, drawn)}]
        results.write_parts(run, name, done)
    return done[0]


def table(result: dict[str, Any]) -> tables.Table:
    """The result of `measure` as a table, with a row for each point."""
    rows = []
    cells = lambda found: (
        tables.estimate(found["gen_ppl_per_sequence"], found["gen_ppl_per_sequence_stderr"], 2),
        tables.estimate(found["gen_ppl_pooled"], digits=2),
        tables.estimate(found["unigram_entropy"], found["unigram_entropy_stderr"]),
        generation_quality.cell(found, "distinct_2"),
    )
    for point in result["points"]:
        name = generation_quality.named(point["sampler"])
        rows.append((f"{name}, {point['draw']} draws", f"{point['nfe']:.4g}", *cells(point)))
    if result["judge_samples"]:
        own = result["judge_samples"]
        rows.append((_title_of_judge(own), str(own["nfe"]), *cells(own)))
    rows.append(("held-out text", "", *cells(result["held_out"])))
    notes = [f"drawn in {results.DIRECTORY}/{result['picture']} of the run"]
    if any(point["draw"] == "published" for point in result["points"]):
        noise = "published draws imitate the float32 noise of the published program, which lowers entropy and flatters"
        notes.insert(0, noise)
    return tables.Table(
        head=[
            f"{result['workdir']}  step {result['step']}  {result['num_samples']} samples of {result['length']} tokens "
            f"a point, {', '.join([result['dtype'], *generation_quality.changed(result)])}",
            f"read by {result['judge']}",
        ],
        columns=("", "nfe", "perplexity of sequences", "pooled", "unigram entropy", "distinct pairs"),
        rows=rows,
        notes=notes,
    )


def _title_of_judge(own: dict[str, Any]) -> str:
    """What the judge's own samples are called, with the settings of its config that change them."""
    return ", ".join(["the judge's own samples", *generation_quality.changed(own)])


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
    """Draws perplexity, and below it entropy, against network evaluations into a PNG file."""
    from matplotlib import figure, ticker

    picture = figure.Figure(figsize=(9, 8), dpi=150, layout="constrained")
    quality, entropy = picture.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    curves: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for point in result["points"]:
        curves.setdefault((point["sampler"], point["draw"]), []).append(point)
    names = list(dict.fromkeys(sampler for sampler, _ in curves))
    for (sampler, draw), points in curves.items():
        points = sorted(points, key=lambda point: point["nfe"])
        is_precise = draw == "precise"
        style = {
            "color": COLORS[names.index(sampler) % len(COLORS)],
            "linestyle": "solid" if is_precise else "dashed",
            "marker": "o" if is_precise else "x",
            "linewidth": 1.8,
            "capsize": 3,
        }
        nfe = [point["nfe"] for point in points]
        for axes, name in ((quality, "gen_ppl_per_sequence"), (entropy, "unigram_entropy")):
            stderrs = [point[f"{name}_stderr"] or 0.0 for point in points]
            label = f"{generation_quality.named(sampler)}, {draw} draws" if axes is quality else None
            values = [math.nan if point[name] is None else point[name] for point in points]
            axes.errorbar(nfe, values, yerr=stderrs, label=label, **style)
    for label, found, color in (
        ("held-out text", result["held_out"], "#667085"),
        (_title_of_judge(result["judge_samples"] or {}), result["judge_samples"], "#111827"),
    ):
        if found:
            quality.axhline(found["gen_ppl_per_sequence"] or math.nan, color=color, linestyle="dotted", label=label)
            entropy.axhline(found["unigram_entropy"], color=color, linestyle="dotted")
    quality.set(xscale="log", yscale="log", ylabel="perplexity, mean of sequences", title="Quality against compute")
    entropy.set(xlabel="network evaluations of a sequence", ylabel="unigram entropy, nats")
    nfes = sorted({point["nfe"] for point in result["points"]})
    quality.xaxis.set_major_locator(ticker.FixedLocator(nfes))
    quality.xaxis.set_minor_locator(ticker.NullLocator())
    quality.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    for axes in (quality.xaxis, quality.yaxis):
        axes.set_major_formatter(ticker.FormatStrFormatter("%g"))
    quality.yaxis.set_minor_formatter(ticker.NullFormatter())
    save(picture, path)


def save(picture: Any, path: pathlib.Path) -> None:
    """Gives a Matplotlib figure its grids and legend, and writes it as a whole."""
    for axes in picture.axes:
        axes.grid(color="#e4e7ec", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    picture.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    partial = path.with_suffix(".png.partial")
    picture.savefig(partial, format="png")
    partial.replace(path)


def _write_csv(result: dict[str, Any], path: pathlib.Path) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ("sampler", "draw", "num_steps", "nfe", *_FIGURES), extrasaction="ignore")
    writer.writeheader()
    writer.writerows(result["points"])
    storage.replace_text(path, text.getvalue())
