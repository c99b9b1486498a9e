"""Bounds on the likelihood of a given text."""

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from sedd_jax import runs
from sedd_jax.bounds import likelihoods
from sedd_jax.runtime import errors

_COPIES = 32  # of a window, in a pass


class Bound(NamedTuple):
    """A bound on the negative log-likelihood of a text. Of the autoregressive baseline it is the exact value.

    Attributes:
        name: score_entropy, cross_entropy (the tighter one, where the graph has it) or negative_log_likelihood.
        nats_per_token: the bound.
        nats_per_token_stderr: its standard error, over draws of time and noise; infinite for a single draw.
        num_tokens: tokens of the text.
        num_characters: characters of the text.
    """

    name: str
    nats_per_token: float
    nats_per_token_stderr: float
    num_tokens: int
    num_characters: int

    @property
    def bits_per_character(self) -> float:
        """The bound in bits per character."""
        return self.nats_per_token * self._bits

    @property
    def bits_per_character_stderr(self) -> float:
        """The standard error of `bits_per_character`."""
        return self.nats_per_token_stderr * self._bits

    @property
    def perplexity(self) -> float:
        """exp of the bound per token."""
        return math.exp(self.nats_per_token)

    @property
    def _bits(self) -> float:
        return self.num_tokens / (math.log(2) * self.num_characters)


def bound_text(opened: runs.OpenRun, text: str, *, num_times: int = 128, seed: int = 0) -> Bound:
    """Bounds the likelihood of a text by the published protocol: t in [1e-3, 1], without the terms at the ends.

    The text is cut into windows of the model's length. The last one may be shorter, a length that the model was not
    trained on.

    Args:
        opened: the run.
        text: the text, of at least one token.
        num_times: draws of time and noise for each window, at least two for a standard error; 32 of them, a pass, are
            spread evenly over time. Rounded up to whole passes.
        seed: seed of times and noise.

    Raises:
        errors.UserError: where there are no draws, the text is empty, or has characters that the tokenizer does not
            know.
    """
    likelihoods.check(num_times, 1.0, _COPIES)
    run, length = opened.run, opened.run.config.data.length
    tokens = run.tokenizer.encode(text)
    if not len(tokens):
        raise errors.UserError("holds no token", field="text", value=text, remedy="give a longer text")
    windows = [tokens[at : at + length] for at in range(0, len(tokens), length)]
    with opened.on_devices():
        seeds = np.random.SeedSequence(seed).generate_state(len(windows))
        found = [
            _bound_window(opened, window, num_times, int(of_window))
            for window, of_window in zip(windows, seeds, strict=True)
        ]
    shares = np.array([len(window) for window in windows]) / len(tokens)
    means = [share * estimate.mean for share, (_, estimate) in zip(shares, found, strict=True)]
    errors_of = [share * estimate.stderr for share, (_, estimate) in zip(shares, found, strict=True)]
    return Bound(found[0][0], float(sum(means)), math.hypot(*errors_of), len(tokens), len(text))


def _bound_window(
    opened: runs.OpenRun, window: Int[np.ndarray, "L"], num_times: int, seed: int
) -> tuple[str, likelihoods.Estimate]:
    """Name and estimate of the tightest bound on a window, from passes over copies of it at different times."""
    run = opened.run
    num_copies = 1 if run.is_autoregressive else min(_COPIES, -(-num_times // 2))
    copies = np.tile(window[None], (num_copies, 1))
    values_fn = functools.partial(_values_fn(run), opened.model)
    drawn = likelihoods.passes(values_fn, copies, batch_size=_COPIES, seed=seed, is_exact=run.is_autoregressive)
    num_passes = 1 if run.is_autoregressive else -(-num_times // num_copies)
    bounds = likelihoods.named_bounds(run, likelihoods.combine(list(itertools.islice(drawn, num_passes))))
    return list(bounds.items())[-1]


@functools.lru_cache(maxsize=8)
def _values_fn(run: runs.Run) -> likelihoods.ModelValuesFn:
    """`likelihoods.make_values_fn`, compiled once for each run."""
    return likelihoods.make_values_fn(run)
