"""Layers of the network whose gradient is written by hand, and the precision of matrix products.

Automatic differentiation computes the same gradients, but XLA then writes float32 arrays of the size of the residual
stream only to sum them over positions. Here the sums are formed at once; docs/performance.md has the gains.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sedd_jax.runtime import sharding

# Names of `NetworkConfig.dtype` -> dtype of the arrays between matrix products.
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "tensorfloat32": jnp.float32}
EPS = 1e-5


def precision(dtype: str) -> jax.lax.Precision:
    """Precision of products of float32 arrays under `NetworkConfig.dtype`. It has no effect on bfloat16 arrays.

    JAX's default would round the factors: to TF32 on NVIDIA GPUs, to bfloat16 on TPUs. Only "tensorfloat32" on a GPU
    asks for that.
    """
    rounds = dtype == "tensorfloat32" and sharding.platform() == "gpu"
    return jax.lax.Precision.DEFAULT if rounds else jax.lax.Precision.HIGHEST


class _Row(NamedTuple):
    """Mean and inverse standard deviation of each row of features."""

    mean: Float[Array, "B L 1"]
    inverse_std: Float[Array, "B L 1"]

    @classmethod
    def of(cls, x: Float[Array, "B L D"]) -> "_Row":
        mean = x.mean(-1, keepdims=True)
        return cls(mean, jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + EPS))

    def normalize(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return (x - self.mean) * self.inverse_std


@jax.custom_vjp
def modulated_norm(
    x: Float[Array, "B L D"], weight: Float[Array, " D"], shift: Float[Array, "B 1 D"], scale: Float[Array, "B 1 D"]
) -> Float[Array, "B L D"]:
    """Adaptive LayerNorm in float32: LayerNorm(x) * weight * (1 + scale) + shift, with eps 1e-5 (Peebles and Xie 2023).

    The gradients of weight, shift and scale all follow from two sums over positions: of the gradient g, and of
    g LayerNorm(x).
    """
    return _modulated_norm_forward(x, weight, shift, scale)[0]


@jax.named_scope("norm")
def _modulated_norm_forward(x, weight, shift, scale):
    row = _Row.of(x)
    return row.normalize(x) * weight[None, None] * (1 + scale) + shift, (x, row, weight, scale)


@jax.named_scope("norm")
def _modulated_norm_backward(residuals, gradient):
    x, row, weight, scale = residuals
    normalized = row.normalize(x)
    of_shift = gradient.sum(1, keepdims=True)
    along = (gradient * normalized).sum(1, keepdims=True)
    of_normalized = gradient * (weight[None, None] * (1 + scale))
    of_x = of_normalized - of_normalized.mean(-1, keepdims=True)
    of_x = row.inverse_std * (of_x - normalized * (of_normalized * normalized).mean(-1, keepdims=True))
    return of_x, (along * (1 + scale)).sum((0, 1)), of_shift, along * weight[None, None]


modulated_norm.defvjp(_modulated_norm_forward, _modulated_norm_backward)


@jax.custom_vjp
def biased_gelu(x: Float[Array, "B L E"], bias: Float[Array, " E"]) -> Float[Array, "B L E"]:
    """GELU(x + bias), in the tanh approximation and the dtype of x. The gradient of the bias is summed in float32."""
    return jax.nn.gelu(_add(x, bias), approximate=True)


def _biased_gelu_forward(x, bias):
    return biased_gelu(x, bias), (x, bias)


def _biased_gelu_backward(residuals, gradient):
    # Without the first barrier XLA keeps what forward and backward pass have in common; without the second it also
    # writes a float32 copy for the sum.
    x, bias = jax.lax.optimization_barrier(residuals)
    _, pull = jax.vjp(lambda x: jax.nn.gelu(x, approximate=True), _add(x, bias))
    (of_x,) = pull(gradient)
    of_x = jax.lax.optimization_barrier(of_x)
    return of_x, of_x.astype(bias.dtype).sum((0, 1))


biased_gelu.defvjp(_biased_gelu_forward, _biased_gelu_backward)


def _add(x: Float[Array, "B L E"], bias: Float[Array, " E"]) -> Float[Array, "B L E"]:
    return x + bias.astype(x.dtype)[None, None]


@jax.custom_vjp
def gather_gradient(x: Float[Array, "B L E"]) -> Float[Array, "B L E"]:
    """x itself. Its gradient becomes one array before anything reads it.

    The gradient of queries, keys and values is a concatenation, which XLA would otherwise repeat in each of the two
    products that read it.
    """
    return x


gather_gradient.defvjp(lambda x: (x, None), lambda _, gradient: (jax.lax.optimization_barrier(gradient),))
