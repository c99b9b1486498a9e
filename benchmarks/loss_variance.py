"""How much the loss and the gradient of a training step vary, by law of times and with paired noise.

    python benchmarks/loss_variance.py runs/novels 256

The weights are the run's newest ones and stay as they are. Each step has its own text of the training split, its own
noise and times, and as many noisy sequences as the run's steps had; with paired noise they come from half as many
texts. Dropout is off. A gradient's variance is the sum over all parameters. All laws see the same texts and keys.
"""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from sedd_jax import runs
from sedd_jax.diffusion import time_laws
from sedd_jax.model import networks, objectives


@functools.partial(jax.jit, static_argnames=("run", "law", "paired"))
def step(
    key: Key[Array, ""],
    params: networks.Params,
    x0: Int[Array, "B L"],
    moments: time_laws.Moments,
    *,
    run: runs.Run,
    law: str,
    paired: bool,
) -> Any:
    """Loss in nats per token and its gradient, as one vector, of one step; and the moments of its losses."""
    key_times, key_noise = jax.random.split(key)
    times = time_laws.sample_times(key_times, len(x0), law, moments=moments, paired=paired)
    x0 = jnp.repeat(x0[: len(x0) // 2], 2, axis=0) if paired else x0

    def loss(params: networks.Params) -> tuple[Float[Array, ""], Float[Array, "B"]]:
        model = networks.Model(run.network, params)
        found = objectives.mean_bounds(key_noise, model, run.process, x0, times, paired=paired)
        return found.score_entropy / x0.shape[1], found.of_sequences * len(x0) / times.weights

    (value, of_sequences), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    flat = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(gradient)])
    return value, flat, time_laws.add_losses(time_laws.no_moments(), times.t, of_sequences)


def main(workdir: str, num_steps: int) -> None:
    run = runs.load(workdir)
    tokens, config = run.split("train").tokens, run.config
    params = run.restore(weights="params").model.params
    shape = (config.training.batch_size, config.data.length)

    def batch(rng: np.random.Generator) -> np.ndarray:
        starts = rng.integers(len(tokens) - shape[1], size=shape[0])
        return np.stack([tokens.read(start, start + shape[1]) for start in starts]).astype(np.int32)

    def measure(law: str, paired: bool, moments: time_laws.Moments, seed: int) -> tuple[float, float, Any]:
        """The variances of loss and gradient, and the moments of all steps together."""
        rng, losses, mean, squares = np.random.default_rng(seed), [], 0.0, 0.0
        found = time_laws.no_moments()
        for i in range(num_steps):
            key = jax.random.fold_in(jax.random.key(seed), i)
            value, gradient, of_step = step(key, params, batch(rng), moments, run=run, law=law, paired=paired)
            found = jax.tree.map(jnp.add, found, of_step)
            losses.append(float(value))
            far = gradient - mean  # Welford's recurrence
            mean = mean + far / (i + 1)
            squares += float(jnp.vdot(far, gradient - mean))
        return np.var(losses, ddof=1).item(), squares / (num_steps - 1), found

    # Other texts than those that are measured.
    moments = measure("uniform", False, time_laws.no_moments(), 0)[2]
    print(f"{workdir}: {num_steps} steps a line; a variance's error is about {np.sqrt(2 / (num_steps - 1)):.0%}")
    print("law of times  paired  variance of the loss   of the gradient   (relative to the first line)")
    first = None
    for law in time_laws.time_laws():
        for paired in (False, True):
            loss, gradient, _ = measure(law, paired, moments, 1)
            first = first or (loss, gradient)
            relative = f"{loss / first[0]:8.2f} {gradient / first[1]:8.2f}"
            print(f"{law:<14}{'yes' if paired else 'no':<8}{loss:<23.3e}{gradient:<18.3e}{relative}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
