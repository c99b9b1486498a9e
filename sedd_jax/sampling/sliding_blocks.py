"""Draws texts longer than the model's length, block after block (semi-autoregressive).

Each block continues the text so far. The model sees only a window of its own length, so what came before the window
does not influence a block.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.reverse import steps
from sedd_jax.runtime import errors, storage, terminals
from sedd_jax.sampling import generate, templates


def sample(
    workdir: storage.Directory,
    written: templates.Written,
    *,
    num_tokens: int,
    block: int | None = None,
    step: int | None = None,
    seed: int = 0,
    watch: terminals.Watch | None = None,
    **settings: Any,
) -> list[generate.Sample]:
    """Draws texts longer than the model's length from a checkpoint of a run.

    `num_tokens` and `block` are those of `draw`; the other arguments and the errors are those of `generate.generate`.
    """
    run = runs.load(workdir)
    changed = run.sampling(**settings)
    template = templates.read(run, written)
    check(run, template, num_tokens, block)
    opened = run.restore(step)
    with opened.on_devices():
        return draw(opened, template, changed, num_tokens=num_tokens, block=block, seed=seed, watch=watch)


def check(run: runs.Run, template: templates.Template, num_tokens: int, block: int | None) -> None:
    """Checks the sizes of a long text.

    Raises:
        errors.UserError: where the text fits in one window, the template does not fill the first window, or a block
            leaves no room for tokens before it.
    """
    length = run.config.data.length
    if num_tokens <= length:
        raise errors.UserError(
            f"must be more than the model's length {length}",
            field="num_tokens",
            value=num_tokens,
            remedy="leave it out",
        )
    block = length // 2 if block is None else block
    if not 0 < block < length:
        raise errors.UserError(f"must be at least 1 and below the model's length {length}", field="block", value=block)
    if template.length < length:
        raise errors.UserError(
            f"goes on from a whole window, and the template ends after {template.length} of {length} tokens",
            field="num_tokens",
            remedy=f"give a {errors.name('prefix')}, or a template of full length",
        )


def draw(
    opened: runs.OpenRun,
    template: templates.Template,
    settings: configs.SamplingConfig,
    *,
    num_tokens: int,
    block: int | None = None,
    seed: int,
    watch: terminals.Watch | None = None,
) -> list[generate.Sample]:
    """Draws texts whose first window is that of `generate.draw_samples`, and continues them.

    Args:
        opened: the run.
        template: what is known of the first window, which is drawn as a whole.
        settings: number of texts, and how each window is drawn.
        num_tokens: tokens of a text.
        block: tokens that each further window adds after those that it sees; half of the model's length if None.
        seed: seed of all random numbers.
        watch: see `generate.generate`; steps are those of each window.

    Raises:
        errors.UserError: as `generate.draw_samples` does.
    """
    run, length = opened.run, opened.run.config.data.length
    block = length // 2 if block is None else block
    shape = (settings.num_samples, length)
    whole = lambda x: jnp.broadcast_to(jnp.asarray(x), shape)
    given = steps.Given(whole(template.tokens.astype(np.int32)), whole(template.is_given))
    patterns = templates.compile_patterns(run, [template] * settings.num_samples)
    text = np.zeros((settings.num_samples, 0), np.int32)
    taken: list[np.ndarray] = []
    for index, own in enumerate(_seeds(seed, 1 + -(-(num_tokens - length) // block))):
        if index:
            seen = length - block
            tokens = np.concatenate([text[:, len(text[0]) - seen :], np.zeros((len(text), block), np.int32)], axis=1)
            given, patterns = steps.Given(jnp.asarray(tokens), whole(np.arange(length) < seen)), None
        show = None if watch is None else generate.as_text(run, length, watch)
        rows = generate.draw_tokens(
            opened, given, settings, seed=own, patterns=patterns, watch=show, count=taken.append
        )
        text = np.concatenate([text, rows if not index else rows[:, length - block :]], axis=1)
    how = generate.circumstances(run, settings, length)
    return [
        generate.Sample(
            text=run.tokenizer.decode(row),
            tokens=row.tolist(),
            seed=seed,
            index=index,
            step=opened.step,
            checksum=opened.checksum,
            nfe=int(nfe),
            **how,
        )
        for index, (row, nfe) in enumerate(zip(text[:, :num_tokens], np.sum(taken, axis=0), strict=True))
    ]


def _seeds(seed: int, number: int) -> list[int]:
    """A seed for each window; the first is `seed` itself, so that its window is that of `generate.draw_samples`."""
    return [seed, *np.random.SeedSequence(seed).generate_state(number - 1).tolist()]
