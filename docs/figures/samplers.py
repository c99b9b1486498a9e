"""Draws docs/figures/samplers.png: error of each sampler on an enumerable problem, and quality on trained runs.

python docs/figures/samplers.py RUN [RUN ...]

First run `sedd eval --curve=nfe:5,9,17,33,65` on each run, once for each variant shown.
"""

import itertools
import json
import pathlib
import sys

import numpy as np
from matplotlib import figure, ticker

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from sedd_jax.diffusion import graphs, noise_schedules  # noqa: E402
from sedd_jax.reverse import time_grids  # noqa: E402
from tests.support import oracles  # noqa: E402

N, LENGTH = 3, 3
P0 = np.random.default_rng(0).dirichlet(np.full(N**LENGTH, 0.3)).reshape((N,) * LENGTH) * 0.95 + 0.05 / N**LENGTH
PROBLEMS = {
    "absorbing": (graphs.Absorbing(vocab_size=N, mask_id=N), noise_schedules.LogLinear()),
    "uniform": (graphs.Uniform(vocab_size=N), noise_schedules.Geometric(sigma_max=6.0)),
}
LABELS = ("euler", "tau_leaping", "tweedie", "tweedie, cosine", "tweedie, 1 corrector", "theta_trapezoidal")
NFES = (3, 5, 9, 17, 33, 65)
COLORS = {
    "euler": "#868e96",
    "tau_leaping": "#d9480f",
    "tweedie": "#1f5fae",
    "tweedie, cosine": "#74a9dd",
    "tweedie, tuned": "#0b7285",
    "tweedie, 1 corrector": "#862e9c",
    "theta_trapezoidal": "#2b8a3e",
    "first_hitting": "#111827",
    "first_hitting, 1 corrector": "#b08900",
}


STYLE = {"marker": "o", "markersize": 4, "linewidth": 1.6}


def errors(kind):
    """sampler -> [(NFE, total variation to the distribution of the data)], by exact propagation in float64."""
    graph, noise = PROBLEMS[kind]
    xs = oracles.states(graph, LENGTH)
    sigma = lambda t: float(-np.log1p(-(1 - 1e-3) * t)) if kind == "absorbing" else 1e-4 ** (1 - t) * 6.0**t
    rate_of = lambda t: (1 - 1e-3) / (1 - (1 - 1e-3) * t) if kind == "absorbing" else sigma(t) * np.log(6.0 / 1e-4)
    start = (xs == N).all(-1).astype(float) if kind == "absorbing" else np.full(len(xs), 1 / len(xs))
    exact = oracles.embed(graph, P0).ravel()

    def weights(name, t, end):
        score = oracles.exact_scores(graph, P0, sigma(t))
        found = oracles.step_weights(graph, name, score, xs, sigma(t) - sigma(end), (t - end) * rate_of(t))
        return np.where(oracles.marginal(graph, P0, sigma(t)).ravel()[:, None, None] > 0, found, 1.0)

    def leap(integrated, states):
        """Distributions after leaps from the given states, with rates [S, L, V]."""
        rates = np.maximum(integrated, 0) * (1 - np.eye(graph.num_states))[states]
        total = rates.sum(-1, keepdims=True)
        moved = rates * -np.expm1(-total) / np.maximum(total, 1e-300)
        return moved + np.eye(graph.num_states)[states] * np.exp(-total)

    def own_rates(s):
        """Rates in the graph's own time, see `leap_time` of the graph."""
        speed = np.expm1(s) if kind == "absorbing" else 1.0
        return speed * oracles.rate_matrix(graph)[xs] * oracles.exact_scores(graph, P0, s)

    def trapezoid(p, t, end):
        own, back = (
            (lambda s: np.log(-np.expm1(-s)), lambda u: -np.log1p(-np.exp(u)))
            if kind == "absorbing"
            else (lambda s: s, lambda u: u)
        )
        half = (own(sigma(t)) - own(sigma(end))) / 2
        first, second = own_rates(sigma(t)), own_rates(back(own(sigma(t)) - half))
        between, after = leap(half * first, xs), np.zeros_like(p)
        for i in np.flatnonzero(p):
            q = oracles.step(np.broadcast_to(between[i], between.shape), np.eye(len(xs))[i] * p[i])
            back_rates = np.where((xs == xs[i])[..., None], first[i][None], 0)
            to = leap(half * (2 * second - back_rates), xs)
            after += oracles.step(np.where(q[:, None, None] > 0, to, np.eye(graph.num_states)[xs]), q)
        return after

    def after_denoising(p):
        score = oracles.exact_scores(graph, P0, sigma(time_grids.T_END))
        final = oracles.step_weights(graph, "tweedie", score, xs, sigma(time_grids.T_END), 0.0)
        if kind == "absorbing":
            final[..., N] = 0
        reachable = oracles.marginal(graph, P0, sigma(time_grids.T_END)).ravel() > 0
        return oracles.step(np.where(reachable[:, None, None], final, 1.0), p)

    found = {}
    for nfe in NFES:
        for label in LABELS:
            cost = 2 if label in ("theta_trapezoidal", "tweedie, 1 corrector") else 1
            name, _, variant = label.partition(", ")
            times = time_grids.times("cosine" if variant == "cosine" else "uniform", noise, (nfe - 1) // cost)
            p = start
            for t, end in itertools.pairwise(times):
                if name == "theta_trapezoidal":
                    p = trapezoid(p, t, end)
                    continue
                once = weights(name, t, end)
                p = oracles.step(once, p)
                if variant == "1 corrector":
                    kernel = oracles.kernel(graph, sigma(t) - sigma(end))
                    back = np.ones((1, 1))
                    for _ in range(LENGTH):
                        back = np.kron(back, kernel)
                    p = oracles.step(once, back @ p)
            found.setdefault(label, []).append((nfe, np.abs(after_denoising(p) - exact).sum() / 2))
    if kind == "absorbing":
        found["first_hitting"] = first_hitting()
    return found


def first_hitting():
    """[(NFE, total variation)] of first_hitting, over all orders of positions; exact from 3 evaluations on."""
    found = []
    for nfe, groups in ((1, ((0, 1, 2),)), (2, ((0,), (1, 2)))):
        sampled = np.zeros_like(P0)
        orders = list(itertools.permutations(range(LENGTH)))
        for order in orders:
            p = np.ones((1,) * LENGTH)
            known = []
            for group in groups:
                for place in group:
                    unknown = tuple(i for i in range(LENGTH) if i not in known and i != order[place])
                    joint = P0.sum(unknown, keepdims=True)
                    p = p * joint / joint.sum(order[place], keepdims=True)
                known += [order[place] for place in group]
            sampled += p / len(orders)
        found.append((nfe, np.abs(sampled - P0).sum() / 2))
    return found


def curves(run):
    """(label, draw) -> points of all curves measured on a run; also the same figures of held-out text."""
    found, held_out = {}, None
    for file in sorted((run / "evaluations").glob("curve-*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        grid = {"uniform": "", "cosine": ", cosine"}.get(result["grid"], ", tuned")
        again = f", {result['corrector_steps']} corrector" if result["corrector_steps"] else ""
        for point in result["points"]:
            found.setdefault((point["sampler"] + grid + again, point["draw"]), []).append(point)
        held_out = result["held_out"]
    return found, held_out


def draw_run(run, quality, entropy):
    """Draw quality and entropy of a run's samples on two axes; return the labels of the curves."""
    found, held_out = curves(run)
    for (label, draw), points in sorted(found.items()):
        points = sorted(points, key=lambda point: point["nfe"])
        nfe = [point["nfe"] for point in points]
        lines = "solid" if draw == "precise" else "dotted"
        for axes, name in ((quality, "gen_ppl_per_sequence"), (entropy, "unigram_entropy")):
            values, errors = ([point[key] for point in points] for key in (name, f"{name}_stderr"))
            axes.errorbar(nfe, values, yerr=errors, color=COLORS[label], linestyle=lines, **STYLE)
    quality.set(title=f"{run.name}: perplexity under the judge, mean of sequences", ylabel="perplexity", yscale="log")
    entropy.set(title=f"{run.name}: unigram entropy (held-out text: dashed)", ylabel="nats")
    entropy.axhline(held_out["unigram_entropy"], color="#667085", linestyle="dashed")
    for format_of in (quality.yaxis.set_major_formatter, quality.yaxis.set_minor_formatter):
        format_of(ticker.FormatStrFormatter("%g"))
    return {label for label, _ in found}


def main(runs):
    picture = figure.Figure(figsize=(12, 4.5 * (1 + len(runs))), dpi=130, layout="constrained")
    (absorbing, uniform), *rows = picture.subplots(1 + len(runs), 2, squeeze=False)
    table = {}
    for axes, kind in ((absorbing, "absorbing"), (uniform, "uniform")):
        for label, points in errors(kind).items():
            axes.plot(*zip(*points, strict=True), color=COLORS[label], label=label, **STYLE)
            table[f"{kind}: {label}"] = {nfe: float(f"{value:.2g}") for nfe, value in points}
        axes.set(title=f"{kind}, exact score, {LENGTH} tokens of {N}", ylabel="total variation")
    absorbing.annotate("first_hitting: 0 from 3 on\n(euler is tweedie here)", (1, 0.012), fontsize=9)
    shown = {"euler"}.union(*(draw_run(run, *row) for run, row in zip(runs, rows, strict=True)))
    for axes in (absorbing, uniform):
        axes.set_yscale("log")
    for axes in (absorbing, uniform, *itertools.chain(*rows)):
        axes.set(xscale="log", xlabel="network evaluations")
        axes.xaxis.set_major_locator(ticker.FixedLocator([1, 3, 5, 9, 17, 33, 65, 129]))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.grid(color="#e4e7ec", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [
        figure.Figure().subplots().plot([], [], color=color, label=label, **STYLE)[0]
        for label, color in COLORS.items()
        if label in shown
    ]
    picture.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    picture.savefig(HERE / "samplers.png")
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main([pathlib.Path(run) for run in sys.argv[1:]])
