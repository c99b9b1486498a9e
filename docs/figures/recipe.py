"""Draws docs/figures/recipe.png: held-out bits against steps, one panel a text, one line a run.

python docs/figures/recipe.py RUN [RUN ...]

Runs on the same text share a panel. A line is named by what differs: graph, normalisation, optimizer, peak learning
rate, schedule and seed.
"""

import pathlib
import sys

from matplotlib import pyplot

from sedd_jax import runs
from sedd_jax.runtime import metric_lines

BOUND = "valid/score_entropy_bits"


def main(workdirs: list[str]) -> None:
    by_text: dict[str, list[runs.Run]] = {}
    for run in (runs.load(pathlib.Path(workdir)) for workdir in workdirs):
        by_text.setdefault(run.config.data.source, []).append(run)
    figure, panels = pyplot.subplots(1, len(by_text), figsize=(5.5 * len(by_text), 4.4), squeeze=False)
    for panel, (text, of_text) in zip(panels[0], by_text.items(), strict=True):
        for run in of_text:
            per_token, optimizer = run.split("valid").characters_per_token, run.config.optimizer
            records = [one for one in metric_lines.read(run.local / "metrics.jsonl") if BOUND in one]
            points = [(one["step"], one[BOUND] / per_token, one[f"{BOUND}_stderr"] / per_token) for one in records]
            steps, bits, errors = zip(*points, strict=True)
            graph = f"{run.config.graph.name}{', normalized' if run.config.network.normalize else ''}"
            label = f"{graph}, {optimizer.name} {optimizer.learning_rate:g} {optimizer.schedule}, {run.config.seed}"
            panel.errorbar(steps, bits, yerr=errors, marker="o", capsize=3, label=label)
        panel.set(title=text, xlabel="step", ylabel="bits per character of held-out text, at most")
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(pathlib.Path(__file__).with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main(sys.argv[1:])
