"""loss.png: plots of a run's losses, drawn from its metrics.jsonl."""

import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from sedd_jax.runtime import metric_lines
from sedd_jax.training import metric_writers

RAW_COLOR, SMOOTH_COLOR, REFERENCE_COLOR = "#a9c4e6", "#1f5fae", "#667085"
BOUNDS = {
    "valid/score_entropy_bits": ("held-out score-entropy bound", "#d9480f"),
    "valid/cross_entropy_bits": ("held-out cross-entropy bound", "#2b8a3e"),
    "valid/negative_log_likelihood_bits": ("held-out negative log-likelihood", "#2b8a3e"),
}

SECONDS_BETWEEN_PICTURES = 60.0


def _series(records: list[dict[str, Any]], name: str) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"]]:
    """Steps and finite values of one metric, in ascending order. If a step has two lines, the later one counts.

    Values that are not finite stand in the file as text and are left out, as is whatever else is no number.
    """
    values = {record["step"]: record[name] for record in records if isinstance(record.get(name), int | float)}
    points = sorted((step, value) for step, value in values.items() if math.isfinite(value))
    array = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _smooth(values: Float[np.ndarray, " S"]) -> Float[np.ndarray, " S"]:
    """A running mean over a fifteenth of the points. The window is narrower at the start, where losses drop fast."""
    index = np.arange(len(values))
    half = np.minimum(index // 4, len(values) // 30)
    first, end = index - half, np.minimum(index + half + 1, len(values))
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[end] - total[first]) / (end - first)


def _limits(values: Float[np.ndarray, " S"]) -> tuple[float, float]:
    """Limits of a logarithmic axis around positive values, with a margin."""
    low, high = values.min(), values.max()
    margin = max((high / low) ** 0.06, 1.02)
    return low / margin, high * margin


def _draw(axes: Any, records: list[dict[str, Any]], train: str | None) -> Float[np.ndarray, " S"]:
    """Draws the curves and returns the values that set the scale of the axis.

    The huge first values and the noise of single training steps are left out of these.
    """
    settled = 0.05 * max((record["step"] for record in records), default=0)
    shown = [np.zeros(0)]
    if train is not None:
        steps, values = _series(records, train)
        axes.plot(steps, values, color=RAW_COLOR, linewidth=0.8, label="training, logged steps")
        marker = "o" if len(steps) == 1 else "none"
        axes.plot(steps, _smooth(values), color=SMOOTH_COLOR, linewidth=2, marker=marker, label="training, smoothed")
        late = values[steps >= settled]
        shown.append(np.percentile(late, [0.5, 99.5]) if len(late) else late)
    for name, (label, color) in BOUNDS.items():
        steps, values = _series(records, name)
        if len(steps):
            errors = dict(zip(*_series(records, f"{name}_stderr"), strict=True))
            bars = [errors.get(step, 0.0) for step in steps]
            last = f"{values[-1]:.3f}" + (f" ± {bars[-1]:.3f}" if errors else "")
            style = {"color": color, "linewidth": 1.4, "marker": "o", "markersize": 4, "capsize": 3}
            axes.errorbar(steps, values, yerr=bars, label=f"{label}, last {last}", **style)
            shown.append(values[steps >= settled])
    return np.concatenate(shown)


def plot_curves(
    metrics_path: str | os.PathLike[str], png_path: str | os.PathLike[str], references: Mapping[str, float]
) -> None:
    """Plots training bits and the held-out bounds over the steps.

    Args:
        metrics_path: the metrics.jsonl to read.
        png_path: the picture to write.
        references: horizontal lines by name, such as {"bigram entropy": 3.4}.
    """
    if metric_writers.is_missing("matplotlib"):
        metric_writers.say_missing("matplotlib", "no loss.png, metrics.jsonl holds its numbers")
        return
    from matplotlib import figure, ticker

    records = metric_lines.read(metrics_path)
    train = next((name for record in records for name in record if name.startswith("train/bits_per_")), None)
    unit = "bits" if train is None else f"bits per {train.removeprefix('train/bits_per_')}"
    picture = figure.Figure(figsize=(9, 6), dpi=150, layout="constrained")
    axes = picture.add_subplot(title="Bits over training, lower is better", xlabel="step", ylabel=f"{unit} (log scale)")
    shown = np.concatenate([_draw(axes, records, train), list(references.values())])
    for index, (label, level) in enumerate(references.items()):
        dashes = (0, (6 - 2 * (index % 3), 2))
        axes.axhline(level, color=REFERENCE_COLOR, linewidth=1.2, linestyle=dashes, label=f"{label} {level:.3f}")
    if np.any(shown > 0):
        axes.set(yscale="log", ylim=_limits(shown[shown > 0]))
        axes.yaxis.set_major_locator(ticker.MaxNLocator(12, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        picture.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    else:
        axes.text(0.5, 0.5, "no metrics yet", transform=axes.transAxes, ha="center", color=REFERENCE_COLOR)
    axes.set_xlim(0, max(1.02 * max((record["step"] for record in records), default=0), 1))
    axes.xaxis.set_major_locator(ticker.MaxNLocator(10, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes.grid(color="#e4e7ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    partial = f"{os.fspath(png_path)}.partial"
    picture.savefig(partial, format="png")
    os.replace(partial, png_path)


def occasional_plot(
    metrics_path: str | os.PathLike[str], png_path: str | os.PathLike[str], references: Mapping[str, float]
) -> Callable[[bool], None]:
    """Make a function (is_last) that calls `plot_curves` once a minute at most, and always at the last step.

    A picture takes as long as many steps of a small network.
    """
    drawn = time.monotonic()

    def plot(is_last: bool) -> None:
        nonlocal drawn
        if is_last or time.monotonic() - drawn >= SECONDS_BETWEEN_PICTURES:
            plot_curves(metrics_path, png_path, references)
            drawn = time.monotonic()

    return plot
