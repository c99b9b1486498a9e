"""Tunes a time grid to a checkpoint: finds the times at which a given number of steps loses the least likelihood.

The loss of a step (`graphs.Graph.step_bound`) depends on its two times alone. So dynamic programming finds the best
path through a set of candidate times (Watson et al. 2021, arXiv 2106.03802). One network evaluation at a time gives the
losses of all steps that start there.
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
from sedd_jax.evaluation import results, tables
from sedd_jax.model import objectives
from sedd_jax.reverse import time_grids
from sedd_jax.runtime import errors, processes, sharding, storage, terminals

_CANDIDATES = 64  # candidate times, at least
_MOST_STEPS = 1024
# (key, x0, time of each sequence, times at which steps end) -> loss of each sequence in the step to each end, in nats
# per token.
_LossFn = Callable[
    [Key[Array, ""], Int[np.ndarray, "B L"], Float[np.ndarray, "B"], Float[np.ndarray, "n"]],
    Float[Array, "n B"],
]


def tune(
    workdir: storage.Directory,
    *,
    num_steps: int = 16,
    step: int | None = None,
    num_sequences: int = 128,
    batch_size: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """Finds the best time grid and keeps it in the run directory, where the grid "tuned" refers to it.

    Args:
        workdir: the run directory.
        num_steps: reverse steps that the grid is for.
        step: the checkpoint; the newest if None.
        num_sequences: held-out sequences. One half tunes the grid, the other half compares it with other grids.
        batch_size: sequences in a batch.
        seed: seed of the choice of sequences and of the noise.

    Returns:
        `times`, and likelihood bounds on the second half of the sequences, in nats per token: `bounds` of each grid
        with `num_steps` steps, and `bound_of_all` with a step to every candidate time.

    Raises:
        errors.UserError: where the run is autoregressive, or there is too little text.
    """
    run = runs.load(workdir)
    if run.is_autoregressive:
        raise errors.UserError(
            "is autoregressive: it takes its steps token by token, not in time",
            field="workdir",
            value=workdir,
            remedy="give a diffusion run",
        )
    for field, value, least in (("num_steps", num_steps, 1), ("num_sequences", num_sequences, 2)):
        if value < least:
            raise errors.UserError(f"must be at least {least}", field=field, value=value)
    if num_steps > _MOST_STEPS:
        problem = f"must be at most {_MOST_STEPS}: so many steps need no tuned grid"
        raise errors.UserError(problem, field="num_steps", value=num_steps, remedy="use the grid of the config")
    opened = run.restore(step)
    split = run.split("valid")
    chosen = np.random.default_rng(seed).permutation(split.num_sequences)[:num_sequences]
    if len(chosen) < 2:
        raise errors.UserError(
            f"has {len(chosen)} held-out sequences, and two are needed",
            field="workdir",
            value=workdir,
            remedy="prepare more text",
        )
    sequences = split.sequences()[np.sort(chosen)].astype(np.int32)
    candidates = np.linspace(1, time_grids.T_END, max(_CANDIDATES, 4 * num_steps) + 1)
    with opened.on_devices(), terminals.progress() as report:
        width = len(candidates) - 1
        losses = functools.partial(_losses, _make_loss_fn(opened), width, batch_size=batch_size, seed=seed)
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
        bounds = {}
        for done, (name, times) in enumerate((*grids.items(), ("", candidates)), 1):
            bounds[name] = bound(times)
            report("bounds", done / (len(grids) + 1), done * judged.size)
        bound_of_all = bounds.pop("")
    result = {
        **results.circumstances(opened),
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
        with results.keeping():
            runs.write_json(run.local / runs.TIME_GRID, kept)
            storage.upload(run.workdir, runs.TIME_GRID)
    results.keep(run, name, result)
    return result


def best_path(losses: Float[np.ndarray, "n n"], num_steps: int) -> Int[np.ndarray, "m"]:
    """Indices of the path from first to last index, in `num_steps` steps, with the least sum of losses[i, j]."""
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
    """The result of `tune` as a table."""
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


def _make_loss_fn(opened: runs.OpenRun) -> _LossFn:
    """A compiled function of a batch that gives the losses of steps."""
    process = opened.run.process
    graph, noise = process.graph, process.noise

    def losses(model, key, x0, t, ends):
        sigma = noise.sigma(t)
        xt = graph.sample_transition(key, x0, sigma)
        summary = objectives.summary_fn(model, process)(xt, x0, sigma)

        def loss(end: Float[Array, ""]) -> Float[Array, "B"]:
            after = jnp.broadcast_to(noise.sigma(end), sigma.shape)
            return graph.step_bound(summary, sigma, after, xt, x0).mean(-1)

        return sharding.replicate(jax.lax.map(loss, ends))

    return functools.partial(jax.jit(losses), opened.model)


def _losses(
    loss_fn: _LossFn,
    width: int,
    sequences: Int[np.ndarray, "S L"],
    start: float,
    ends: Float[np.ndarray, "n"],
    *,
    batch_size: int,
    seed: int,
) -> Float[np.ndarray, "n"]:
    """Losses of the steps from `start` to each of `ends` (at most `width`), in nats per token."""
    size = min(batch_size, len(sequences))
    # Padded to one shape for any number of ends. Noise is the same at every time, so that losses differ by time alone.
    padded = np.full(width, ends[-1], np.float32)
    padded[: len(ends)] = ends
    found = []
    for at in range(0, len(sequences), size):
        rows = np.arange(at, at + size) % len(sequences)
        key = jax.random.fold_in(jax.random.key(seed), at)
        t = np.full(size, start, np.float32)
        # The last batch is filled up with other sequences, which do not count.
        losses = np.asarray(loss_fn(key, sequences[rows], t, padded), np.float64)
        found.append(losses[: len(ends), : len(sequences) - at])
    return np.concatenate(found, axis=1).mean(axis=1)
