"""The published PyTorch names and layouts of the network's weights, as plain NumPy; torch is not needed."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sedd_jax.model import networks
from sedd_jax.runtime import errors

# (path below a block or the root here, published name, whether the published matrix is the transpose of ours)
_ROOT = (
    (("sigma_embedding", "in", "kernel"), "sigma_map.mlp.0.weight", True),
    (("sigma_embedding", "in", "bias"), "sigma_map.mlp.0.bias", False),
    (("sigma_embedding", "out", "kernel"), "sigma_map.mlp.2.weight", True),
    (("sigma_embedding", "out", "bias"), "sigma_map.mlp.2.bias", False),
    (("final_norm",), "output_layer.norm_final.weight", False),
    (("final_modulation", "kernel"), "output_layer.adaLN_modulation.weight", True),
    (("final_modulation", "bias"), "output_layer.adaLN_modulation.bias", False),
)
_BLOCK = (
    (("attention_norm",), "norm1.weight", False),
    (("qkv", "kernel"), "attn_qkv.weight", True),
    (("attention_out", "kernel"), "attn_out.weight", True),
    (("mlp_norm",), "norm2.weight", False),
    (("mlp_in", "kernel"), "mlp.0.weight", True),
    (("mlp_in", "bias"), "mlp.0.bias", False),
    (("mlp_out", "kernel"), "mlp.2.weight", True),
    (("mlp_out", "bias"), "mlp.2.bias", False),
    (("modulation", "kernel"), "adaLN_modulation.weight", True),
    (("modulation", "bias"), "adaLN_modulation.bias", False),
)
ROTARY = "rotary_emb.inv_freq"


def parameter_names(num_layers: int) -> list[str]:
    """Names of the parameters in the order in which the published program's moving average lists them."""
    block = [name for _, name, _ in _BLOCK]
    head = ["norm_final.weight", "linear.weight", "linear.bias", "adaLN_modulation.weight", "adaLN_modulation.bias"]
    return [
        "vocab_embed.embedding",
        *(name for _, name, _ in _ROOT if name.startswith("sigma_map")),
        *(f"blocks.{i}.{name}" for i in range(num_layers) for name in block),
        *(f"output_layer.{name}" for name in head),
    ]


def shapes(config: networks.NetworkConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every published tensor for a network of these sizes."""
    params = jax.eval_shape(lambda: networks.init(jax.random.key(0), config))
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), params)
    return {name: tensor.shape for name, tensor in to_torch(zeros, config).items()}


def check(tensors: Mapping[str, np.ndarray], config: networks.NetworkConfig) -> None:
    """Raises errors.UserError that names the tensors that are missing, unknown, of another shape, or not finite."""
    expected = shapes(config)
    missing, unknown = sorted(set(expected) - set(tensors) - {ROTARY}), sorted(set(tensors) - set(expected))
    if missing or unknown:
        raise errors.UserError(
            f"these are not the weights of this network: missing {missing[:4]}, unknown {unknown[:4]}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name]:
            raise errors.UserError(f"tensor {name} has shape {tensor.shape}, but the config means {expected[name]}")
        if not np.isfinite(tensor.astype(np.float32)).all():
            raise errors.UserError(
                f"tensor {name} holds values that are not finite", remedy="the file is damaged or the run diverged"
            )


def from_torch(tensors: Mapping[str, np.ndarray], config: networks.NetworkConfig) -> networks.Params:
    """Parameters from published tensors; raises as `check` does."""
    check(tensors, config)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), arrange(tensors, config, np))


def arrange(tensors: Mapping[str, Any], config: networks.NetworkConfig, numpy: Any) -> networks.Params:
    """Published tensors in our layout, padded to the vocabulary multiple with zeros, by `numpy` or `jax.numpy`."""
    params: networks.Params = {}
    for path, name, transposed in _ROOT:
        _put(params, path, tensors[name].T if transposed else tensors[name])
    padding = (0, config.padded_states - config.num_states)
    params["embedding"] = numpy.pad(tensors["vocab_embed.embedding"], (padding, (0, 0)))
    params["head_kernel"] = numpy.pad(tensors["output_layer.linear.weight"].T, ((0, 0), padding))
    params["head_bias"] = numpy.pad(tensors["output_layer.linear.bias"], padding)
    for path, name, transposed in _BLOCK:
        layers = [tensors[f"blocks.{i}.{name}"] for i in range(config.num_layers)]
        _put(params, ("blocks", *path), numpy.stack([layer.T if transposed else layer for layer in layers]))
    return params


def to_torch(params: networks.Params, config: networks.NetworkConfig) -> dict[str, np.ndarray]:
    """Published tensors from parameters, the vocabulary's padding cut off."""
    n = config.num_states
    tensors = {name: _array(_get(params, path), transposed) for path, name, transposed in _ROOT}
    tensors["vocab_embed.embedding"] = _array(params["embedding"][:n], False)
    tensors["output_layer.linear.weight"] = _array(params["head_kernel"][:, :n], True)
    tensors["output_layer.linear.bias"] = _array(params["head_bias"][:n], False)
    for path, name, transposed in _BLOCK:
        for i, layer in enumerate(np.asarray(_get(params["blocks"], path))):
            tensors[f"blocks.{i}.{name}"] = _array(layer, transposed)
    tensors[ROTARY] = rotary(config)
    return tensors


def rotary(config: networks.NetworkConfig) -> np.ndarray:
    """Frequencies of the rotary positions, which the published program keeps beside its weights."""
    half = config.head_size // 2
    return (1.0 / (10_000 ** (np.arange(half, dtype=np.float32) / np.float32(half)))).astype(np.float32)


def without_noise(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of a network that takes every noise level for 0, as those of one that is told sigma = 0 always do.

    At 0 the 256 sinusoids are 128 ones and 128 zeros: what the first layer makes of them becomes its bias.
    """
    kernel, bias = (tensors[f"sigma_map.mlp.0.{name}"].astype(np.float64) for name in ("weight", "bias"))
    return {
        **tensors,
        "sigma_map.mlp.0.weight": np.zeros(kernel.shape, np.float32),
        "sigma_map.mlp.0.bias": (bias + kernel[:, :128].sum(1)).astype(np.float32),
    }


def _array(x: Any, transposed: bool) -> np.ndarray:
    x = np.asarray(x)
    return np.ascontiguousarray(x.T if transposed else x)


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def _get(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    for part in path:
        tree = tree[part]
    return tree
