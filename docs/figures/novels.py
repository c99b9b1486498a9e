"""Draws docs/figures/novels.png from the three runs of configs/novels.py: held-out bits, and quality against NFE.

python docs/figures/novels.py runs/novels_absorb runs/novels_uniform runs/novels_ar

First evaluate each run as docs/evaluation.md shows.
"""

import pathlib
import sys

from matplotlib import pyplot

from sedd_jax import runs
from sedd_jax.evaluation import results
from sedd_jax.runtime import metric_lines

COLORS = {"absorb": "#1f5fae", "uniform": "#d9480f", "autoregressive": "#2b8a3e"}
BOUNDS = ("valid/negative_log_likelihood_bits", "valid/cross_entropy_bits", "valid/score_entropy_bits")


def main(workdirs: list[str]) -> None:
    figure, (training, samples) = pyplot.subplots(1, 2, figsize=(11, 4.8))
    for run in (runs.load(pathlib.Path(workdir)) for workdir in workdirs):
        graph, per_token = run.config.graph.name, run.split("valid").characters_per_token
        records = metric_lines.read(run.local / "metrics.jsonl")
        bound = next(name for name in BOUNDS if any(name in record for record in records))
        points = [
            (record["step"], record[bound] / per_token, record[f"{bound}_stderr"] / per_token)
            for record in records
            if bound in record
        ]
        steps, bits, errors = zip(*points, strict=True)
        label = f"{graph}, {bound.removeprefix('valid/').removesuffix('_bits').replace('_', ' ')}"
        training.errorbar(steps, bits, yerr=errors, color=COLORS[graph], marker="o", capsize=3, label=label)
        for curve in results.load(run).get("curve", [])[-1:]:
            for draw, style in (("precise", "o-"), ("published", "x--")):
                drawn = [point for point in curve["points"] if (point["sampler"], point["draw"]) == ("tweedie", draw)]
                nfe, figures = zip(*((point["nfe"], point["gen_ppl_per_sequence"]) for point in drawn), strict=True)
                samples.plot(nfe, figures, style, color=COLORS[graph], label=f"{graph}, {draw} draws")
            if graph == "absorb":
                own = curve["judge_samples"]
                point, label = (own["nfe"], own["gen_ppl_per_sequence"]), "autoregressive: the judge's own"
                samples.plot(*point, "*", color=COLORS["autoregressive"], markersize=12, label=label)
                samples.axhline(curve["held_out"]["gen_ppl_per_sequence"], color="k", ls=":", label="held-out text")
    training.set(xlabel="step", ylabel="bits per character of held-out text, at most")
    samples.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel="perplexity under the judge")
    samples.set_xticks((5, 9, 17, 33, 65, 129), (5, 9, 17, 33, 65, 129))
    samples.set_yticks((50, 100, 200, 500, 1000, 2000), (50, 100, 200, 500, 1000, 2000))
    samples.minorticks_off()
    for panel in (training, samples):
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    figure.tight_layout()
    figure.savefig(pathlib.Path(__file__).with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main(sys.argv[1:])
