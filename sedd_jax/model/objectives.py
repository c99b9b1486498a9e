"""The training objective: the loss of a batch, as a function of the model and the forward process only."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from sedd_jax.diffusion import forward, graphs, losses, scores, time_laws
from sedd_jax.model import autoregression, networks, score_heads, score_losses


def mean_bounds(
    key: Key[Array, ""],
    model: networks.Model,
    process: forward.Process,
    x0: Int[Array, "B L"],
    times: time_laws.Times,
    dropout_key: Key[Array, ""] | None = None,
    *,
    paired: bool = False,
) -> score_losses.Total:
    """The mean of `sequence_bounds` over the batch. Training minimises its `score_entropy`.

    Its expectation does not depend on the distribution of the times.

    Value and gradient take one pass over the head's logits. The gradient of anything but `score_entropy` is 0.

    Args:
        key: key of the noise.
        model: the network.
        process: the forward process.
        x0: clean tokens.
        times: time of each sequence.
        dropout_key: key of dropout; None turns dropout off.
        paired: whether sequences 2i and 2i + 1 get opposite noise.
    """
    if model.config.causal:
        return autoregression.mean_bounds(model, x0, process.graph, dropout_key)
    with jax.named_scope("noise"):
        inputs = losses.noised(key, process, x0, times, paired=paired)
    return noised_bounds(model, process.graph, inputs, dropout_key)


def noised_bounds(
    model: networks.Model, graph: graphs.Graph, inputs: losses.Noised, dropout_key: Key[Array, ""] | None = None
) -> score_losses.Total:
    """`mean_bounds` of sequences that are noised already."""
    features = networks.apply(model, inputs.xt, inputs.sigma, dropout_key)
    bounds_fn = functools.partial(losses.of_positions, graph)
    return score_losses.total(model, features, inputs, graph.is_noise(inputs.xt), bounds_fn)


def sequence_bounds(
    key: Key[Array, ""], model: networks.Model, process: forward.Process, x0: Int[Array, "B L"], t: Float[Array, "B"]
) -> losses.Bounds:
    """Bounds on -log p(x0) of each sequence, in nats, for one draw of noise at times t and without dropout.

    For the autoregressive baseline both are -log p(x0) itself, whatever the noise and the time.
    """
    if model.config.causal:
        exact = -autoregression.log_likelihood(model, x0, process.graph).sum(-1)
        return losses.Bounds(score_entropy=exact, cross_entropy=exact)
    return losses.denoising_score_entropy(key, summary_fn(model, process), process, x0, t)


def sequence_reconstruction(
    key: Key[Array, ""], model: networks.Model, process: forward.Process, x0: Int[Array, "B L"]
) -> Float[Array, "B"]:
    """Reconstruction term of each sequence in nats, for one draw of noise at t = T_MIN.

    It is -log of the probability that the last step restores x0.
    """
    sigma = process.noise.sigma(jnp.full(len(x0), time_laws.T_MIN))
    xt = process.graph.sample_transition(key, x0, sigma)
    summary = summary_fn(model, process)(xt, x0, sigma)
    return process.graph.reconstruction(summary, sigma, xt, x0).sum(-1)


def summary_fn(model: networks.Model, process: forward.Process) -> losses.SummaryFn:
    """The network as a loss calls it: (xt, x0, sigma) -> `scores.ScoreSummary`, three numbers per position."""

    def summarize(xt: Int[Array, "B L"], x0: Int[Array, "B L"], sigma: Float[Array, "B"]) -> scores.ScoreSummary:
        features = networks.apply(model, xt, sigma)
        return score_heads.summarize(model, features, xt, x0, sigma, process.graph.is_noise(xt))

    return summarize
