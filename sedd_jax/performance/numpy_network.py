"""The network and its training loss once more, in NumPy and float64: what a device's numbers are compared with.

It is written from the paper (Lou et al. 2023) for the absorbing graph without dropout, and shares no code with the
network in JAX. It is slow, and for tiny sizes only.
"""

import math
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sedd_jax.diffusion import losses
from sedd_jax.model import networks

FloatArray = Float[np.ndarray, "..."]


def features(
    config: networks.NetworkConfig, params: networks.Params, xt: Int[np.ndarray, "B L"], sigma: Float[np.ndarray, "B"]
) -> Float[np.ndarray, "B L D"]:
    """What `networks.apply` returns."""
    x = params["embedding"][xt]
    condition = _silu(_sigma_embedding(params["sigma_embedding"], sigma))
    for i in range(config.num_layers):
        x = _block(config, _layer(params["blocks"], i), x, condition)
    shift, scale = np.split(_linear(params["final_modulation"], condition)[:, None], 2, axis=-1)
    return _modulated_norm(x, params["final_norm"], shift, scale)


def log_score(
    config: networks.NetworkConfig, params: networks.Params, xt: Int[np.ndarray, "B L"], sigma: Float[np.ndarray, "B"]
) -> Float[np.ndarray, "B L V"]:
    """log of the score, with `config.scale_by_sigma`: z - log((e^sigma - 1) N). The current token's has no meaning."""
    z = features(config, params, xt, sigma) @ params["head_kernel"] + params["head_bias"]
    num_tokens = config.num_states - 1
    return z[..., : config.num_states] - np.log(np.expm1(sigma) * num_tokens)[:, None, None]


def loss(config: networks.NetworkConfig, params: networks.Params, inputs: losses.Noised) -> float:
    """The weighted sum of score entropy (definition 3.1) over all masks, which have the last id.

    A mask at x0 has the terms s_y - r_y log s_y + r_y (log r_y - 1) for each token y, with the score s and the true
    ratio r: 1 / (e^sigma - 1) for y = x0, 0 for any other y.
    """
    mask = config.num_states - 1
    xt, x0 = np.asarray(inputs.xt), np.asarray(inputs.x0)
    sigma, weights = (np.asarray(x, np.float64) for x in (inputs.sigma, inputs.weights))
    log_s = log_score(config, params, xt, sigma)[..., :mask]
    ratio = np.eye(mask)[x0] / np.expm1(sigma)[:, None, None]
    log_ratio = np.log(np.where(ratio > 0, ratio, 1.0))
    terms = np.exp(log_s) - ratio * log_s + ratio * (log_ratio - 1)
    return float((weights[:, None] * (xt == mask) * terms.sum(-1)).sum())


def _block(config: networks.NetworkConfig, params: networks.Params, x: FloatArray, condition: FloatArray) -> FloatArray:
    modulation = np.split(_linear(params["modulation"], condition)[:, None], 6, axis=-1)
    shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = modulation
    h = _modulated_norm(x, params["attention_norm"], shift_attention, scale_attention)
    h = _attention(h @ params["qkv"]["kernel"], config.num_heads) @ params["attention_out"]["kernel"]
    x = x + gate_attention * h
    h = _modulated_norm(x, params["mlp_norm"], shift_mlp, scale_mlp)
    return x + gate_mlp * _linear(params["mlp_out"], _gelu(_linear(params["mlp_in"], h)))


def _sigma_embedding(params: networks.Params, sigma: FloatArray) -> FloatArray:
    angles = sigma[:, None] * 10_000 ** (-np.arange(128) / 128)
    waves = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    return _linear(params["out"], _silu(_linear(params["in"], waves)))


def _attention(qkv: FloatArray, num_heads: int) -> FloatArray:
    batch, length, _ = qkv.shape
    heads = qkv.reshape(batch, length, 3, num_heads, -1)
    q, k, v = (np.moveaxis(heads[:, :, i], 2, 1) for i in range(3))
    scores = _rotate(q) @ np.swapaxes(_rotate(k), -1, -2) / math.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = weights / weights.sum(-1, keepdims=True) @ v
    return np.moveaxis(out, 1, 2).reshape(batch, length, -1)


def _rotate(x: FloatArray) -> FloatArray:
    """Rotary positions: features j and j + K/2 are a complex number, turned by l 10000^(-2j/K) at position l."""
    length, size = x.shape[-2:]
    half = size // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(
        1j * np.outer(np.arange(length), 10_000 ** (-np.arange(half) / half))
    )
    return np.concatenate([turned.real, turned.imag], axis=-1)


def _modulated_norm(x: FloatArray, weight: FloatArray, shift: FloatArray, scale: FloatArray) -> FloatArray:
    normalized = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return normalized * weight * (1 + scale) + shift


def _linear(params: networks.Params, x: FloatArray) -> FloatArray:
    return x @ params["kernel"] + params["bias"]


def _silu(x: FloatArray) -> FloatArray:
    return x / (1 + np.exp(-x))


def _gelu(x: FloatArray) -> FloatArray:
    """GELU in the tanh approximation."""
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def _layer(stacked: Any, i: int) -> Any:
    """Parameters of block i, from those of all blocks."""
    return {name: _layer(of, i) if isinstance(of, dict) else of[i] for name, of in stacked.items()}
