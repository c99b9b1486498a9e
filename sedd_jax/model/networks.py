"""The score network: the diffusion transformer of Lou et al. 2023 (section 5.1), as a pure function of its parameters.

`ScoreNetwork(config).apply({"params": params}, xt, sigma)` returns features. `score_heads` turns them into scores,
without an array over positions and vocabulary.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from sedd_jax.model import attentions, layers
from sedd_jax.runtime import accelerators, sharding

Params = dict[str, Any]
VOCAB_MULTIPLE = 128
_policies = jax.checkpoint_policies
# jax.nn.dot_product_attention does not name its residuals, but cuDNN's forward pass is one operation.
_save_cudnn: Any = lambda operation, *_, **__: "dot_product_attention_fwd" in operation.name
_save_attention = _policies.save_from_both_policies(_policies.save_only_these_names(attentions.RESIDUALS), _save_cudnn)
REMAT_POLICIES = {
    "elementwise": _policies.save_from_both_policies(_policies.dots_with_no_batch_dims_saveable, _save_attention),
    "blocks": _policies.nothing_saveable,
}
LAYER_LOOPS = ("auto", "rolled", "unrolled")
# Bytes that a compiled training step with unrolled layers keeps, per token, layer and feature (docs/log.md, 13.1 GiB).
_UNROLLED_BYTES = 48


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Sizes of the network.

    Attributes:
        num_states: number V of states: tokens, and the mask if the graph has one.
        hidden_size: width D of the residual stream.
        num_layers: number of transformer blocks.
        num_heads: number of attention heads; hidden_size / num_heads must be even.
        cond_dim: width of the embedding of the noise level sigma.
        mlp_ratio: width of the MLP's hidden layer, as a multiple of hidden_size.
        dropout: dropout rate on the output of each attention and MLP branch, in training.
        dropout_generator: random generator for dropout, threefry (same result on every mesh) or rbg (cheaper, but its
            result depends on the mesh).
        scale_by_sigma: whether scores are divided by (e^sigma - 1) N, for N tokens (absorbing graph only).
        normalize: whether the softmax of the output is a distribution of the clean token. Absorbing graph: that of x0
            given xt, so that score entropy is cross-entropy (mean parameterisation, SUBS in MDLM). Uniform graph: that
            given all other positions of xt, so that the bound has the form of UDLM's.
        dtype: dtype of the matrix products: float32 (exact on every device), bfloat16, or tensorfloat32 (float32 whose
            products an NVIDIA GPU rounds to TF32; on other devices the same as float32). Everything else is float32.
        remat: rematerialisation, what the backward pass computes again to save memory: none, elementwise (all but
            matrix products and attention; no effect on unrolled layers), or blocks (everything inside a transformer
            block).
        layer_loop: how the loop over blocks is compiled: rolled (once for all blocks; compiles fastest), unrolled (each
            block by itself; fastest and most memory on GPUs), or auto (by platform and memory).
        attention: how attention is computed: auto (the fastest way on this platform), plain (on any platform), cudnn
            (NVIDIA GPU) or splash (TPU).
        causal: whether a position attends only to itself and earlier ones, as in the autoregressive baseline.
    """

    num_states: int
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    cond_dim: int = 128
    mlp_ratio: int = 4
    dropout: float = 0.1
    dropout_generator: str = "threefry"
    scale_by_sigma: bool = True
    normalize: bool = False
    dtype: str = "bfloat16"
    remat: str = "elementwise"
    layer_loop: str = "auto"
    attention: str = "auto"
    causal: bool = False

    @property
    def padded_states(self) -> int:
        """P: num_states rounded up to a multiple of 128, so that the vocabulary axis shards and fills matrix units."""
        return -(-self.num_states // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def mixes_uniformly(self) -> bool:
        """Whether scores are ratios of e^-sigma r + (1 - e^-sigma) / V, where r is the softmax of the output.

        That is `normalize` for the uniform graph; the absorbing one has `scale_by_sigma`, too.
        """
        return self.normalize and not self.scale_by_sigma

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def array_dtype(self) -> DTypeLike:
        """Dtype of the factors of matrix products."""
        return layers.DTYPES[self.dtype]


@flax.struct.dataclass
class Model:
    """A network: its sizes, which are static under `jax.jit`, and its parameters.

    Attributes:
        config: sizes.
        params: parameters of `ScoreNetwork`.
    """

    config: NetworkConfig = flax.struct.field(pytree_node=False)
    params: Params


class ScoreNetwork(nn.Module):
    """Maps noised tokens and noise levels to features."""

    config: NetworkConfig

    @nn.compact
    def __call__(
        self,
        xt: Int[Array, "B L"],
        sigma: Float[Array, "B"],
        dropout_key: Key[Array, ""] | None = None,
        lengths: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Computes features of noised tokens.

        Args:
            xt: noised tokens.
            sigma: total noise of each sequence.
            dropout_key: key of this call's dropout; None turns dropout off.
            lengths: number of tokens of each sequence, at least 1. Padding after them does not change their features.
                No padding if None.

        Returns:
            Features in the dtype `config.array_dtype`, the input of the head's matrix product.
        """
        config = self.config
        embedding = self.param(
            "embedding", _uniform_init(config.hidden_size), (config.padded_states, config.hidden_size)
        )
        # Lookups in a table that is sharded on its features make XLA rematerialise the result. So replicate it first.
        with jax.named_scope("embedding"):
            x = sharding.constrain(sharding.replicate(embedding)[xt], "batch", None, None)
        condition = nn.silu(SigmaEmbedding(config.cond_dim, name="sigma_embedding")(sigma))
        keys = None
        if dropout_key is not None and config.dropout > 0:
            keys = jax.random.split(_generator_key(dropout_key, config.dropout_generator), config.num_layers)
        block, unrolls = Block, is_unrolled(config, xt.size)
        # In an unrolled loop XLA merges what `elementwise` computes again with the original.
        if config.remat == "blocks" or (config.remat == "elementwise" and not unrolls):
            block = nn.remat(Block, policy=REMAT_POLICIES[config.remat], prevent_cse=False)
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=config.num_layers,
            in_axes=(nn.broadcast, 0, nn.broadcast),
            unroll=config.num_layers if unrolls else 1,
        )
        x, _ = blocks(config, name="blocks")(x, condition, keys, lengths)
        shift, scale = jnp.split(_modulation(2, config, "final_modulation", condition), 2, axis=-1)
        x = layers.modulated_norm(x, _norm_weight(self, "final_norm", x), shift, scale)
        # The head's weights live here with the others; `score_heads` applies them.
        self.param("head_kernel", nn.initializers.zeros, (config.hidden_size, config.padded_states))
        self.param("head_bias", nn.initializers.zeros, (config.padded_states,))
        return x.astype(config.array_dtype)


class SigmaEmbedding(nn.Module):
    """Embeds the noise level as C = `cond_dim` features: 256 sinusoids (cosines first), then a two-layer MLP."""

    cond_dim: int

    @nn.compact
    def __call__(self, sigma: Float[Array, "B"]) -> Float[Array, "B C"]:
        half = 128
        frequencies = jnp.exp(-math.log(10_000) * jnp.arange(half, dtype=jnp.float32) / half)
        angles = sigma[:, None] * frequencies[None]
        x = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        x = nn.silu(_pinned(_dense(self.cond_dim, 2 * half, "float32", "in")(x)))
        return _pinned(_dense(self.cond_dim, self.cond_dim, "float32", "out")(x))


class Block(nn.Module):
    """A transformer block: attention and MLP, each with an adaptive LayerNorm and a gate set by the noise level."""

    config: NetworkConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        condition: Float[Array, "B C"],
        key: Key[Array, ""] | None,
        lengths: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B L D"], None]:
        config = self.config
        key_attention, key_mlp = (None, None) if key is None else jax.random.split(key)
        modulation = _modulation(6, config, "modulation", condition)
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = jnp.split(
            modulation, 6, axis=-1
        )

        h = layers.modulated_norm(x, _norm_weight(self, "attention_norm", x), shift_attention, scale_attention)
        qkv = _dense(3 * config.hidden_size, config.hidden_size, config.dtype, "qkv", use_bias=False)(h)
        h = attentions.attend(
            layers.gather_gradient(qkv),
            config.num_heads,
            config.attention,
            causal=config.causal,
            lengths=lengths,
            precision=layers.precision(config.dtype),
        )
        h = _dense(config.hidden_size, config.hidden_size, config.dtype, "attention_out", use_bias=False)(h)
        x = x + gate_attention * _dropout(key_attention, config.dropout, h)

        h = layers.modulated_norm(x, _norm_weight(self, "mlp_norm", x), shift_mlp, scale_mlp)
        h = BiasedGelu(config.mlp_ratio * config.hidden_size, config.dtype, name="mlp_in")(h)
        h = _dense(config.hidden_size, config.mlp_ratio * config.hidden_size, config.dtype, "mlp_out")(h)
        x = x + gate_mlp * _dropout(key_mlp, config.dropout, h)
        return sharding.constrain(x, "batch", None, None), None


class BiasedGelu(nn.Module):
    """GELU of a linear layer with E = `features` outputs."""

    features: int
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L E"]:
        init = _uniform_init(x.shape[-1])
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        bias = self.param("bias", init, (self.features,))
        dtype = layers.DTYPES[self.dtype]
        product = jnp.dot(x.astype(dtype), kernel.astype(dtype), precision=layers.precision(self.dtype))
        return layers.biased_gelu(product, bias)


def init(key: PRNGKeyArray, config: NetworkConfig) -> Params:
    """Initial parameters: linear layers as in PyTorch; modulations, head and rows of padded states are zero."""
    tokens = jnp.zeros((1, 8), jnp.int32)
    # Some attention kernels do not support a sequence this short.
    module = ScoreNetwork(dataclasses.replace(config, attention="plain", layer_loop="rolled"))
    params: Params = dict(module.init(key, tokens, jnp.ones((1,)))["params"])
    return {**params, "embedding": params["embedding"].at[config.num_states :].set(0.0)}


def num_parameters(model: Model) -> int:
    """Number of parameters, those of padding states not counted."""
    config, total = model.config, sum(leaf.size for leaf in jax.tree.leaves(model.params))
    # A state has a row of the embedding, a column of the head's kernel and a bias.
    return total - (config.padded_states - config.num_states) * (2 * config.hidden_size + 1)


def apply(
    model: Model,
    xt: Int[Array, "B L"],
    sigma: Float[Array, "B"],
    dropout_key: Key[Array, ""] | None = None,
    lengths: Int[Array, "B"] | None = None,
) -> Float[Array, "B L D"]:
    """Features of noised tokens, in the dtype `model.config.array_dtype`; see `ScoreNetwork`."""
    module = ScoreNetwork(model.config)
    return module.apply({"params": model.params}, xt, sigma, dropout_key, lengths)  # pyrefly: ignore[bad-return]


def _dense(features: int, fan_in: int, dtype: str, name: str, *, use_bias: bool = True) -> nn.Dense:
    init = _uniform_init(fan_in)
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=layers.DTYPES[dtype],
        precision=layers.precision(dtype),
        kernel_init=init,
        bias_init=init,
        name=name,
    )


def _modulation(chunks: int, config: NetworkConfig, name: str, condition: Float[Array, "B C"]) -> Float[Array, "B 1 E"]:
    zeros = nn.initializers.zeros
    dense = nn.Dense(
        chunks * config.hidden_size,
        dtype=jnp.float32,
        precision=layers.precision("float32"),
        kernel_init=zeros,
        bias_init=zeros,
        name=name,
    )
    return _pinned(dense(condition))[:, None]


def _pinned(x: Float[Array, "B C"]) -> Float[Array, "B C"]:
    """x, sharded over sequences only.

    Without this, the sharding of a kernel's columns spreads to the gradient of x, which then is no longer sharded over
    sequences (XLA: involuntary full rematerialization).
    """
    return sharding.constrain(x, "batch", None)


def _uniform_init(fan_in: int):
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default for linear layers, and the published embedding."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def _norm_weight(module: nn.Module, name: str, x: Float[Array, "B L D"]) -> Float[Array, " D"]:
    return module.param(name, nn.initializers.ones, (x.shape[-1],))


def _generator_key(key: Key[Array, ""], generator: str) -> Key[Array, ""]:
    """A key of the named random generator, from a threefry key."""
    if generator == "threefry":
        return key
    return jax.random.wrap_key_data(jnp.tile(jax.random.key_data(key), 2), impl=generator)


@jax.named_scope("dropout")
def _dropout(key: Key[Array, ""] | None, rate: float, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    """Inverted dropout; the result is float32, for the residual stream."""
    x = x.astype(jnp.float32)
    if key is None:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0.0)


def is_unrolled(config: NetworkConfig, num_tokens: Any) -> bool:
    """Whether the loop over blocks is unrolled, for a batch of `num_tokens` tokens on all devices.

    `jax.export` passes a symbol as the number of tokens; then `config.layer_loop` must not be "auto" on a GPU.
    """
    if config.layer_loop != "auto":
        return config.layer_loop == "unrolled"
    if sharding.platform() == "cpu":
        # A rolled loop is slower there, but only in a rolled one does `elementwise` save memory.
        return config.remat == "none"
    accelerator = accelerators.find(sharding.device_kind())
    if sharding.platform() != "gpu" or config.remat == "blocks" or accelerator is None:
        return False
    kept = _UNROLLED_BYTES * config.hidden_size * config.num_layers * num_tokens / sharding.num_batch_devices()
    return kept < accelerator.hbm_bytes / 2
