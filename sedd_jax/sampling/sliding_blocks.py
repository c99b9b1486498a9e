"""Text longer than the model: block after block, each drawn after the end of what there is (semi-autoregressive).

The model sees windows of its own length only, so a text is coherent as far as its last tokens carry.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.diffusion import samplers
from sedd_jax.model import networks
from sedd_jax.runtime import sharding, storage, terminals
from sedd_jax.sampling import generate, templates


def sample(
    workdir: storage.Directory,
    *,
    num_tokens: int,
    block: int | None = None,
    step: int | None = None,
    prefix: str = "",
    suffix: str = "",
    template: str = "",
    seed: int = 0,
    watch: terminals.Watch | None = None,
    **settings: Any,
) -> list[generate.Sample]:
    """`generate.generate` of texts that are longer than the model; further arguments are those of `draw`."""
    run = runs.load(workdir)
    changed = generate.sampling_of(run, **settings)
    parsed = templates.choose(run, prefix=prefix, suffix=suffix, template=template)
    check(run, parsed, num_tokens, block)
    mesh = sharding.make_mesh(sharding.MeshConfig())
    step, params = run.ema_params(mesh, step)
    with jax.set_mesh(mesh):
        return draw(run, params, parsed, changed, num_tokens=num_tokens, block=block, seed=seed, step=step, watch=watch)


def check(run: runs.Run, template: templates.Template, num_tokens: int, block: int | None) -> None:
    """Raises ValueError where the first window is all there is or not whole, or a block leaves nothing to see."""
    length = run.config.data.length
    if num_tokens <= length:
        raise ValueError(f"--num_tokens={num_tokens} must be more than the model's length {length}: leave it out")
    if block is not None and not 0 < block < length:
        raise ValueError(f"--block={block} must be at least 1 and below the model's length {length}")
    if template.length < length:
        raise ValueError(
            f"--num_tokens goes on from a whole window, and the template ends after {template.length} of {length} "
            "tokens: give a --prefix, or a template of full length"
        )


def draw(
    run: runs.Run,
    params: networks.Params,
    template: templates.Template,
    settings: configs.SamplingConfig,
    *,
    num_tokens: int,
    block: int | None = None,
    seed: int,
    step: int,
    watch: terminals.Watch | None = None,
) -> list[generate.Sample]:
    """Draws texts that begin as `generate.draw_samples` draws them, and go on.

    Args:
        run: the run.
        params: parameters, usually the moving average.
        template: what is known of the first window, which is drawn whole.
        settings: how many, and how each window is drawn.
        num_tokens: tokens of a text.
        block: tokens that each further window adds after those it sees; half of the model's length if None.
        seed: of everything random.
        step: checkpoint step, only recorded.
        watch: see `generate.draw_samples`; of each window.
    """
    length = run.config.data.length
    block = length // 2 if block is None else block
    shape = (settings.num_samples, length)
    whole = lambda x: jnp.broadcast_to(jnp.asarray(x), shape)
    given = samplers.Given(whole(template.tokens.astype(np.int32)), whole(template.is_given))
    matched = templates.compile_patterns(run, [template] * settings.num_samples)
    text, nfe = np.zeros((settings.num_samples, 0), np.int32), 0
    for index, own in enumerate(_seeds(seed, 1 + -(-(num_tokens - length) // block))):
        if index:
            seen = length - block
            tokens = np.concatenate([text[:, len(text[0]) - seen :], np.zeros((len(text), block), np.int32)], axis=1)
            given, matched = samplers.Given(jnp.asarray(tokens), whole(np.arange(length) < seen)), None
        show = None if watch is None else functools.partial(_show, run, watch)
        rows = generate.draw_tokens(run, params, given, settings, seed=own, matched=matched, watch=show)
        text = np.concatenate([text, rows if not index else rows[:, length - block :]], axis=1)
        num_gaps = int((~np.asarray(given.is_given)).sum(1).max())
        nfe += generate.num_evaluations(run, settings, num_gaps)
    how = generate.circumstances(run, settings, length)
    return [
        generate.Sample(
            text=run.tokenizer.decode(row), tokens=row.tolist(), seed=seed, index=index, step=step, nfe=nfe, **how
        )
        for index, row in enumerate(text[:, :num_tokens])
    ]


def _seeds(seed: int, number: int) -> list[int]:
    """A seed for each window; the first is drawn as `generate.draw_samples` draws it."""
    return [seed, *np.random.SeedSequence(seed).generate_state(number - 1).tolist()]


def _show(run: runs.Run, watch: terminals.Watch, taken: int, total: int, tokens: Any) -> None:
    watch(taken, total, functools.partial(generate.texts, run, tokens, tokens.shape[1]))
