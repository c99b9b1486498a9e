"""Tuning a time grid to a checkpoint: the times between which a number of steps loses least likelihood.

What a step loses (`graphs.Graph.step_bound`) depends on its two times alone. So dynamic programming finds the best path
through a set of candidates (Watson et al. 2021, arXiv 2106.03802), and one evaluation at a time serves all steps from
it.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from sedd_jax import runs
from sedd_jax.diffusion import time_grids
from sedd_jax.evaluation import results, tables
from sedd_jax.model import networks, objectives
from sedd_jax.runtime import processes, sharding, storage, terminals

_CANDIDATES = 64  # times, at least
# (params, key, x0, times that steps start at, [B], and end at, [n]) -> what each loses, nats per token [n].
_LossFn = Callable[[networks.Params, Key[Array, ""], Any, Any, Any], Float[Array, "n"]]


def tune(
    workdir: storage.Directory,
    *,
    num_steps: int = 16,
    step: int | None = None,
    num_sequences: int = 128,
    batch_size: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """Finds the grid and keeps it in the run directory, where `--grid=tuned` finds it.

    Args:
        workdir: the run directory.
        num_steps: reverse steps it is for.
        step: the checkpoint; the newest if None.
        num_sequences: held-out sequences, half of which tune and half of which judge.
        batch_size: sequences at once.
        seed: of sequences and noise.

    Returns:
        `times`, and the bounds of samplers on the other half of the text, in nats per token: `bounds` by grid, with
        `num_steps` each, and `bound_of_all` with a step to every candidate.

    Raises:
        ValueError: where the run is no diffusion, or there is too little text.
    """
    run = runs.load(workdir)
    if run.is_autoregressive:
        raise ValueError(f"{workdir} is autoregressive: it takes its steps token by token, not in time")
    if num_steps < 1 or num_sequences < 2:
        raise ValueError(f"num_steps={num_steps} must be at least 1, num_sequences={num_sequences} at least 2")
    opened = run.restore(step)
    split = run.split("valid")
    chosen = np.random.default_rng(seed).permutation(split.num_sequences)[:num_sequences]
    if len(chosen) < 2:
        raise ValueError(f"{workdir} has {len(chosen)} held-out sequences: two are needed, prepare more text")
    sequences = split.sequences()[np.sort(chosen)].astype(np.int32)
    candidates = np.linspace(1, time_grids.T_END, max(_CANDIDATES, 4 * num_steps) + 1)
    with opened.on_devices(), terminals.progress() as report:
        width = len(candidates) - 1
        losses = functools.partial(
            _losses, _make_loss_fn(run), opened.model.params, width, batch_size=batch_size, seed=seed
        )
        table = np.full((len(candidates),) * 2, np.inf)
        for i in range(width):
            table[i, i + 1 :] = losses(sequences[::2], candidates[i], candidates[i + 1 :])
            report("losses", (i + 1) / width, (i + 1) * sequences[::2].size)
        tuned = candidates[best_path(table, num_steps)]
        judged = sequences[1::2]
        grids = {name: time_grids.times(name, run.process.noise, num_steps) for name in time_grids.NAMES} | {
            "tuned": tuned
        }
        bound = lambda times: float(sum(losses(judged, a, np.array([b]))[0] for a, b in itertools.pairwise(times)))
        bounds = {name: bound(times) for name, times in grids.items()}
        bound_of_all = bound(candidates)
    result = {
        **results.circumstances(run, opened.step),
        "data_sha256": split.sha256,
        "num_steps": num_steps,
        "num_sequences": len(sequences),
        "batch_size": batch_size,
        "seed": seed,
    }
    name = results.name("time_grid", result)
    result |= {"times": [float(t) for t in tuned], "bounds": bounds, "bound_of_all": bound_of_all}
    result["num_candidates"] = width
    if processes.is_first():
        kept = {"times": result["times"], "num_steps": num_steps, "step": opened.step}
        runs.write_json(run.local / runs.TIME_GRID, kept)
        storage.upload(run.workdir, runs.TIME_GRID)
    results.keep(run, name, result)
    return result


def best_path(losses: Float[np.ndarray, "n n"], num_steps: int) -> Int[np.ndarray, "m"]:
    """The path of so many steps from the first place to the last, of the least sum of losses[from, to]."""
    best = losses[0]
    came_from = []
    for _ in range(num_steps - 1):
        through = best[:, None] + losses
        came_from.append(through.argmin(0))
        best = through.min(0)
    path = [len(losses) - 1]
    for places in reversed(came_from):
        path.append(int(places[path[-1]]))
    return np.array([*path, 0])[::-1]


def table(result: dict[str, Any]) -> tables.Table:
    """What `tune` found."""
    lost = lambda bound: f"{bound - result['bound_of_all']:.4f}"
    rows = [(name, f"{bound:.4f}", lost(bound)) for name, bound in result["bounds"].items()]
    return tables.Table(
        head=[
            f"{result['workdir']}  step {result['step']}  {result['num_steps']} steps, {result['num_sequences']} "
            f"held-out sequences, {result['dtype']}"
        ],
        columns=("grid", "bound, nats/token", "lost to few steps"),
        rows=rows,
        notes=[
            f"lost: over {result['num_candidates']} steps; bounds leave out the terms at both ends",
            f"times {','.join(f'{t:.4g}' for t in result['times'])}",
            f"kept in {result['workdir']}/{runs.TIME_GRID}: --grid=tuned takes it",
        ],
    )


def _make_loss_fn(run: runs.Run) -> _LossFn:
    """A compiled function of a batch."""
    graph, noise = run.process.graph, run.process.noise

    def losses(params, key, x0, t, ends):
        sigma = noise.sigma(t)
        xt = graph.sample_transition(key, x0, sigma)
        summary = objectives.summary_fn(networks.Model(run.network, params), run.process)(xt, x0, sigma)

        def loss(end: Float[Array, ""]) -> Float[Array, ""]:
            after = jnp.broadcast_to(noise.sigma(end), sigma.shape)
            return graph.step_bound(summary, sigma, after, xt, x0).mean()

        return sharding.replicate(jax.lax.map(loss, ends))

    return jax.jit(losses)


def _losses(
    loss_fn: _LossFn,
    params: networks.Params,
    width: int,
    sequences: Int[np.ndarray, "S L"],
    start: float,
    ends: Float[np.ndarray, "n"],
    *,
    batch_size: int,
    seed: int,
) -> Float[np.ndarray, "n"]:
    """What steps from `start` to each of `ends`, at most `width`, lose, nats per token."""
    size = min(batch_size, len(sequences))
    # One shape for any number of ends, and the same noise at every time, so that differences are of time alone.
    padded = np.full(width, ends[-1], np.float32)
    padded[: len(ends)] = ends
    found = []
    for at in range(0, len(sequences), size):
        rows = np.arange(at, at + size) % len(sequences)
        key = jax.random.fold_in(jax.random.key(seed), at)
        t = np.full(size, start, np.float32)
        found.append(np.float64(loss_fn(params, key, sequences[rows], t, padded)))
    return np.mean(found, axis=0)[: len(ends)]
