"""The network's weights in the published PyTorch names and layouts, as NumPy arrays. torch is not needed."""

import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sedd_jax.model import networks
from sedd_jax.runtime import errors

# Path in our parameters (below the root or a block), published name, whether the published matrix is ours transposed.
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
# Which tensors a network has. Two layouts are of networks that are not told the noise level.
MODULATED = "modulated"  # The published layout: the noise level sets shifts, scales and gates.
PLAIN = "plain"  # The same without the embedding of the noise level and without modulations.
BIASED = "biased"  # As PLAIN, with a bias in every LayerNorm.


def parameter_names(num_layers: int, layout: str = MODULATED) -> list[str]:
    """Published names of the parameters, in the order in which the published program has them."""
    block = [name for _, name, _ in _BLOCK]
    head = ["norm_final.weight", "linear.weight", "linear.bias", "adaLN_modulation.weight", "adaLN_modulation.bias"]
    names = [
        "vocab_embed.embedding",
        *(name for _, name, _ in _ROOT if name.startswith("sigma_map")),
        *(f"blocks.{i}.{name}" for i in range(num_layers) for name in block),
        *(f"output_layer.{name}" for name in head),
    ]
    if layout != MODULATED:
        names = [name for name in names if not name.startswith("sigma_map") and "adaLN_modulation" not in name]
    if layout == BIASED:
        names += [_bias_of(name) for name in names if ".norm" in name]
    return names


def shapes(config: networks.NetworkConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every published tensor of a network with these sizes."""
    params = jax.eval_shape(lambda: networks.init(jax.random.key(0), config))
    turned = lambda shape, transposed: shape[::-1] if transposed else shape
    found = {name: turned(_get(params, path).shape, transposed) for path, name, transposed in _ROOT}
    found["vocab_embed.embedding"] = found["output_layer.linear.weight"] = (config.num_states, config.hidden_size)
    found["output_layer.linear.bias"] = (config.num_states,)
    for path, name, transposed in _BLOCK:
        shape = turned(_get(params["blocks"], path).shape[1:], transposed)
        found |= {f"blocks.{i}.{name}": shape for i in range(config.num_layers)}
    return found | {ROTARY: (config.head_size // 2,)}


def check_shapes(found: Mapping[str, tuple[int, ...]], config: networks.NetworkConfig, layout: str = MODULATED) -> None:
    """Raises an errors.UserError that names tensors that are missing, unknown, or of another shape.

    A config may claim any size. So it is compared with the tensors before anything of that size is made.
    """
    # With more layers than tensors, some are missing in any case.
    expected = set(parameter_names(min(config.num_layers, len(found)), layout))
    missing, unknown = sorted(expected - set(found)), sorted(set(found) - expected - {ROTARY})
    if missing or unknown:
        raise errors.UserError(
            f"the tensors are not those of this network: missing {missing[:4]}, unknown {unknown[:4]}",
            remedy="give the config and the weights of one model",
        )
    for name, shape in (
        ("vocab_embed.embedding", (config.num_states, config.hidden_size)),
        ("sigma_map.mlp.2.bias", (config.cond_dim,)),
    ):
        if name in expected:
            _compare(name, found[name], shape)
    expected_shapes = shapes(config)
    for name, shape in found.items():
        _compare(name, shape, expected_shapes.get(name, (config.hidden_size,)))  # A bias of a LayerNorm is the rest.


def _compare(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise errors.UserError(
            f"tensor {name} has shape {found}, but the config implies {expected}",
            remedy="give the config and the weights of one model",
        )


def check(tensors: Mapping[str, np.ndarray], config: networks.NetworkConfig) -> None:
    """Raises an errors.UserError that names tensors that are missing, unknown, of another shape, or not finite."""
    check_shapes({name: tensor.shape for name, tensor in tensors.items()}, config)
    check_finite(tensors)


def check_finite(tensors: Mapping[str, np.ndarray]) -> None:
    """Raises an errors.UserError that names a tensor with values that float32 does not hold."""
    for name, tensor in tensors.items():
        if not np.isfinite(tensor.astype(np.float32)).all():
            raise errors.UserError(
                f"tensor {name} holds values that are not finite, so the file is damaged or the run diverged",
                remedy="use another checkpoint",
            )


def from_torch(tensors: Mapping[str, np.ndarray], config: networks.NetworkConfig) -> networks.Params:
    """Our parameters from published tensors; raises as `check` does."""
    check(tensors, config)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), arrange(tensors, config, np))


def arrange(
    tensors: Mapping[str, np.ndarray | jax.Array], config: networks.NetworkConfig, numpy: types.ModuleType
) -> networks.Params:
    """Published tensors in the layout of our parameters, computed with the module `numpy` or `jax.numpy`.

    The vocabulary is padded with zeros to `config.padded_states`.
    """
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
    """Published tensors from our parameters, without the padding of the vocabulary."""
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
    """Frequencies [K/2] of the rotary position embedding, which the published program saves with its weights."""
    half = config.head_size // 2
    return (1.0 / (10_000 ** (np.arange(half, dtype=np.float32) / np.float32(half)))).astype(np.float32)


def modulated(tensors: Mapping[str, np.ndarray], config: networks.NetworkConfig, layout: str) -> dict[str, np.ndarray]:
    """Tensors of a layout as those of a published network with the same outputs at every noise level.

    Its modulations are constant: gates are 1, scales are 0, and a shift is the bias of the LayerNorm, if it has one.
    """
    if layout == MODULATED:
        return dict(tensors)
    kept = {name: x for name, x in tensors.items() if not (".norm" in name and name.endswith(".bias"))}
    zeros, ones = np.zeros(config.hidden_size, np.float32), np.ones(config.hidden_size, np.float32)
    shift = lambda norm: tensors.get(f"{norm}.bias", zeros)
    constant = {name: np.zeros(shape, np.float32) for name, shape in shapes(config).items() if name not in tensors}
    for i in range(config.num_layers):
        parts = (shift(f"blocks.{i}.norm1"), zeros, ones, shift(f"blocks.{i}.norm2"), zeros, ones)
        constant[f"blocks.{i}.adaLN_modulation.bias"] = np.concatenate(parts)
    constant["output_layer.adaLN_modulation.bias"] = np.concatenate((shift("output_layer.norm_final"), zeros))
    return {**kept, **constant, ROTARY: rotary(config)}


def without_noise(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of a network that treats every noise level as sigma = 0.

    They suit a model that was trained with sigma = 0 at all noise levels. At sigma = 0 the 256 sinusoids are 128 ones
    and 128 zeros, so the first layer's product with them is a constant. It is added to that layer's bias.
    """
    kernel, bias = (tensors[f"sigma_map.mlp.0.{name}"].astype(np.float64) for name in ("weight", "bias"))
    return {
        **tensors,
        "sigma_map.mlp.0.weight": np.zeros(kernel.shape, np.float32),
        "sigma_map.mlp.0.bias": (bias + kernel[:, :128].sum(1)).astype(np.float32),
    }


def _bias_of(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def _array(x: np.ndarray | jax.Array, transposed: bool) -> np.ndarray:
    x = np.asarray(x)
    return np.ascontiguousarray(x.T if transposed else x)


def _put(tree: dict[str, Any], path: tuple[str, ...], value: np.ndarray | jax.Array) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def _get(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    for part in path:
        tree = tree[part]
    return tree
