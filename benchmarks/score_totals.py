"""Whether the scores of a run on the uniform graph have the size that they must have, by noise level.

    python benchmarks/score_totals.py RUN [NUM_SEQUENCES]

The sum of a true score over all other tokens, divided by their number N - 1, is 1 on average over noised text, at any
time: E[p(y) / p(xt)] is 1 for every y. At tokens that are noise it is large, up to about 1 / (1 - e^-sigma), where the
context rules them out. So the table also has its mean at noise and at text. Held-out text is noised once.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from sedd_jax import runs
from sedd_jax.model import objectives

TIMES = (0.003, 0.01, 0.03, 0.1, 0.3, 0.6, 0.9)
BATCH_SIZE = 64


def main(workdir: str, num_sequences: int = 256) -> None:
    run = runs.load(pathlib.Path(workdir))
    if not run.graph.mixes_uniformly:
        sys.exit(f"{workdir} is not a run on the uniform graph")
    opened, process = run.restore(), run.process
    score_fn = objectives.summary_fn(opened.model, process)

    @jax.jit
    def totals(key, x0, t):
        sigma = process.noise.sigma(t)
        xt = process.graph.sample_transition(key, x0, sigma)
        return jnp.exp(score_fn(xt, x0, sigma).logsumexp) / (process.graph.num_states - 1), xt != x0

    x0 = run.split("valid").spread(num_sequences).astype(np.int32)
    x0 = x0[: len(x0) // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE, x0.shape[1])
    print(f"{workdir}, {x0.size} tokens\n{'t':>6} {'all':>16} {'noise':>8} {'text':>8} {'share of noise':>15}")
    for number, time in enumerate(TIMES):
        keys = jax.random.split(jax.random.key(number), len(x0))
        with opened.on_devices():
            found = [totals(key, rows, jnp.full(BATCH_SIZE, time)) for key, rows in zip(keys, x0, strict=True)]
        total, is_noise = (np.concatenate([np.asarray(part) for part in parts]) for parts in zip(*found, strict=True))
        error = total.mean(axis=1).std(ddof=1) / np.sqrt(len(total))
        at_noise, at_text = total[is_noise].mean(), total[~is_noise].mean()
        print(f"{time:>6} {total.mean():>8.3f} ± {error:.3f} {at_noise:>8.2f} {at_text:>8.3f} {is_noise.mean():>15.4f}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
