"""Attention, bidirectional or causal, with the fastest implementation of each platform.

Every implementation maps queries, keys and values [B, L, H, K] to [B, L, H, K], with a float32 softmax. If it gets the
number of tokens of each sequence, the padding after them is never attended to, so its content does not matter. Under a
mesh each device computes the attention of its own sequences and heads.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sedd_jax.runtime import errors, sharding

# Most scores (sequences x heads x L x L) that `plain` holds at once. On a CPU they fit in its caches.
BLOCK_SCORES = {"cpu": 1 << 21, "gpu": 1 << 30, "tpu": 1 << 30}
TPU_LANES = 128
# Name of what rematerialisation may keep of attention, for `jax.checkpoint_policies.save_only_these_names`.
RESIDUALS = "attention"


@jax.named_scope("attention")
def attend(
    qkv: Float[Array, "B L Q"],
    num_heads: int,
    implementation: str,
    *,
    causal: bool = False,
    lengths: Int[Array, "B"] | None = None,
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST,
) -> Float[Array, "B L D"]:
    """Multi-head attention with rotary positions on queries and keys.

    Args:
        qkv: queries, keys and values of all heads, one after the other: Q = 3 D.
        num_heads: number of heads H.
        implementation: a name in `ATTENTIONS`, or "auto" for the fastest on this platform.
        causal: whether a position attends only to itself and earlier positions.
        lengths: number of tokens of each sequence, at least 1; the rest is padding, whose output is finite but has no
            meaning. No padding if None.
        precision: precision of products of float32 arrays.

    Raises:
        errors.UserError: where the implementation does not support this platform, dtype or length.
    """
    batch, length, width = qkv.shape
    q_BLHK, k_BLHK, v_BLHK = (x.reshape(batch, length, num_heads, -1) for x in jnp.split(qkv, 3, axis=-1))
    batch_axes, tensor = sharding.mapped_axes(batch)
    spec = PartitionSpec(batch_axes, None, tensor if num_heads % sharding.axis_size(tensor) == 0 else ())
    attention = functools.partial(
        ATTENTIONS[resolve(implementation, length, qkv.dtype)], causal=causal, precision=precision
    )
    inputs, specs = (rotate(q_BLHK), rotate(k_BLHK), v_BLHK), (spec,) * 3
    if lengths is not None:
        inputs, specs = (*inputs, lengths), (*specs, PartitionSpec(batch_axes))
    return sharding.per_device(attention, specs, spec)(*inputs).reshape(batch, length, width // 3)


def resolve(implementation: str, length: int, dtype: DTypeLike) -> str:
    """Name of the implementation to use; "auto" becomes the fastest on the current platform."""
    return choose(sharding.platform(), length, dtype) if implementation == "auto" else implementation


def choose(platform: str, length: int, dtype: DTypeLike) -> str:
    """Name of the fastest implementation on a platform.

    cuDNN and splash need bfloat16, and splash also a length divisible by 128.
    """
    if platform == "gpu" and dtype == jnp.bfloat16:
        return "cudnn"
    if platform == "tpu" and dtype == jnp.bfloat16 and length % TPU_LANES == 0:
        return "splash"
    return "plain"


def rotate(x: Float[Array, "B L H K"]) -> Float[Array, "B L H K"]:
    """x with rotary positions (Su et al. 2021): pairs feature j with j + K/2, base 10000."""
    length, _, size = x.shape[1:]
    inverse_frequency = 1.0 / (10_000 ** (jnp.arange(0, size, 2, dtype=jnp.float32) / size))
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * inverse_frequency[None]
    cos, sin = (f(angles).astype(x.dtype)[None, :, None] for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def cudnn(
    q: Float[Array, "B L H K"],
    k: Float[Array, "B L H K"],
    v: Float[Array, "B L H K"],
    lengths: Int[Array, "B"] | None = None,
    *,
    causal: bool = False,
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST,
) -> Array:
    """cuDNN's fused attention: NVIDIA GPUs from Ampere on, bfloat16.

    Raises:
        errors.UserError: on another platform, or for another dtype.
    """
    del precision  # It has no effect on bfloat16.
    _need("cudnn", "gpu")
    _need_bfloat16("cudnn", q.dtype)
    if lengths is None:
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
    is_token = _is_token(lengths, k.shape[1])[:, :, None, None]
    # cuDNN does not document what it writes for queries that it skips. So it computes all queries, and keys and values
    # of padding are 0.
    k, v = (jnp.where(is_token, x, jnp.zeros_like(x)) for x in (k, v))
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, key_value_seq_lengths=lengths, implementation="cudnn"
    )


def splash(
    q: Float[Array, "B L H K"],
    k: Float[Array, "B L H K"],
    v: Float[Array, "B L H K"],
    lengths: Int[Array, "B"] | None = None,
    *,
    causal: bool = False,
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST,
    interpret: bool = False,
) -> Array:
    """The Pallas splash attention kernel: TPUs, bfloat16, lengths L divisible by 128.

    Args:
        q: queries.
        k: keys.
        v: values.
        lengths: number of tokens of each sequence; no padding if None.
        causal: whether a position attends only to itself and earlier positions.
        precision: not used: it has no effect on bfloat16.
        interpret: whether to interpret the kernel, on any platform and for any dtype, for tests.

    Raises:
        errors.UserError: on another platform, or for another dtype or length.
    """
    del precision
    length, num_heads, size = q.shape[1:]
    if not interpret:
        _need("splash", "tpu")
        _need_bfloat16("splash", q.dtype)
    if length % TPU_LANES:
        raise errors.UserError(
            f"needs a length divisible by {TPU_LANES}, not {errors.name('config.data.length')}={length}",
            field="config.network.attention",
            value="splash",
            remedy=f"set {errors.name('config.network.attention')}=plain",
        )
    block = next(block for block in (512, 256, 128) if length % block == 0)
    mask = splash_attention.CausalMask if causal else splash_attention.FullMask
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([mask((length, length))] * num_heads),
        block_sizes=splash_attention.BlockSizes(*(block,) * 8),
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )
    heads_first = functools.partial(jnp.swapaxes, axis1=1, axis2=2)
    scaled = (q * (1 / math.sqrt(size))).astype(q.dtype)
    inputs = heads_first(scaled), heads_first(k), heads_first(v)
    if lengths is not None:
        # A query attends to keys of its own segment, so all queries are in the segment of the tokens.
        is_token = _is_token(lengths, length).astype(jnp.int32)
        inputs = (*inputs, splash_attention.SegmentIds(q=jnp.ones_like(is_token), kv=is_token))
    out: Any = jax.vmap(kernel)(*inputs)
    return heads_first(out)


def _need(implementation: str, platform: str) -> None:
    if sharding.platform() != platform:
        raise errors.UserError(
            f"runs on a {platform.upper()}, not on this machine's {sharding.platform().upper()}",
            field="config.network.attention",
            value=implementation,
            remedy=f"set {errors.name('config.network.attention')}=auto",
        )


def _need_bfloat16(implementation: str, dtype: DTypeLike) -> None:
    if dtype != jnp.bfloat16:
        raise errors.UserError(
            f"needs bfloat16, not {dtype}",
            field="config.network.attention",
            value=implementation,
            remedy=f"set {errors.name('config.network.dtype')}=bfloat16",
        )


def _is_token(lengths: Int[Array, " n"], length: int) -> Bool[Array, "n L"]:
    """Which of `length` positions are tokens, not padding."""
    return jnp.arange(length)[None] < lengths[:, None]


def plain(
    q: Float[Array, "B L H K"],
    k: Float[Array, "B L H K"],
    v: Float[Array, "B L H K"],
    lengths: Int[Array, "B"] | None = None,
    *,
    causal: bool = False,
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST,
) -> Any:
    """Softmax attention as matrix products, on any platform.

    It works on a block of heads at a time, and the gradient computes the scores again. So the scores of a block fit in
    a CPU's caches (twice as fast there), and memory is linear in the length.
    """
    return _plain(_Rules(causal, precision), q, k, v, lengths)


class _Rules(NamedTuple):
    """What stays the same for all heads: see `plain`."""

    causal: bool
    precision: jax.lax.Precision

    def product(self, equation: str, *factors: Array) -> Array:
        """The einsum of two arrays, accumulated in float32."""
        return jnp.einsum(equation, *factors, precision=self.precision, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _plain(rules: _Rules, q: Array, k: Array, v: Array, lengths: Array | None) -> Array:
    return _plain_forward(rules, q, k, v, lengths)[0]


def _plain_forward(rules: _Rules, q: Array, k: Array, v: Array, lengths: Array | None) -> tuple[Array, Any]:
    attend_block = functools.partial(_attend_block, rules)
    out, logsumexp = checkpoint_name(_by_blocks(attend_block, lengths, q, k, v), RESIDUALS)
    return out, (lengths, q, k, v, out, logsumexp)


def _plain_backward(rules: _Rules, residuals: Any, gradient: Array) -> tuple[Any, ...]:
    return *_by_blocks(functools.partial(_differentiate_block, rules), *residuals, gradient), None


_plain.defvjp(_plain_forward, _plain_backward)


def _scores(
    rules: _Rules, lengths: Int[Array, " n"] | None, q: Float[Array, "n L K"], k: Float[Array, "n L K"]
) -> Float[Array, "n L L"]:
    """Products of keys and queries, which are scaled already; -inf where a query may not attend."""
    scores = rules.product("nqk,nsk->nqs", q, k)
    if rules.causal:
        positions = jnp.arange(q.shape[1])
        scores = jnp.where((positions[:, None] >= positions[None])[None], scores, -jnp.inf)
    return scores if lengths is None else jnp.where(_is_token(lengths, q.shape[1])[:, None], scores, -jnp.inf)


def _attend_block(
    rules: _Rules,
    lengths: Int[Array, " n"] | None,
    q: Float[Array, "n L K"],
    k: Float[Array, "n L K"],
    v: Float[Array, "n L K"],
) -> tuple[Any, Any]:
    scores = _scores(rules, lengths, q * (1 / math.sqrt(q.shape[-1])), k)
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - top)
    mass = weights.sum(-1, keepdims=True)
    out = rules.product("nqs,nsk->nqk", weights.astype(v.dtype), v) / mass
    return out.astype(v.dtype), top + jnp.log(mass)


def _differentiate_block(
    rules: _Rules,
    lengths: Int[Array, " n"] | None,
    q: Float[Array, "n L K"],
    k: Float[Array, "n L K"],
    v: Float[Array, "n L K"],
    out: Float[Array, "n L K"],
    logsumexp: Float[Array, "n L 1"],
    gradient: Float[Array, "n L K"],
) -> tuple[Any, ...]:
    """Gradients of queries, keys and values (Dao et al. 2022, appendix B)."""
    scale = 1 / math.sqrt(q.shape[-1])
    q = q * scale
    probs = jnp.exp(_scores(rules, lengths, q, k) - logsumexp)
    along = (gradient.astype(jnp.float32) * out).sum(-1, keepdims=True)
    of_scores = probs * (rules.product("nqk,nsk->nqs", gradient, v) - along)
    of_scores, probs = of_scores.astype(q.dtype), probs.astype(q.dtype)
    of_q = rules.product("nqs,nsk->nqk", of_scores, k) * scale
    of_k = rules.product("nqs,nqk->nsk", of_scores, q)
    of_v = rules.product("nqs,nqk->nsk", probs, gradient)
    return tuple(x.astype(q.dtype) for x in (of_q, of_k, of_v))


def _by_blocks(fn: Any, lengths: Any, *arrays: Any) -> Any:
    """Maps fn(lengths, *arrays [n, L, K]) over blocks of n heads; n is the largest for which the scores fit."""
    batch, length, num_heads = arrays[0].shape[:3]
    n = batch * num_heads
    most = max(1, BLOCK_SCORES[sharding.platform()] // length**2)
    # If the batch has no size yet (`jax.export`), a block is the heads of one sequence.
    size = next(size for size in range(min(most, n), 0, -1) if n % size == 0) if isinstance(n, int) else num_heads
    split = lambda x: jnp.swapaxes(x, 1, 2).reshape(n // size, size, length, -1)
    join = lambda x: jnp.swapaxes(x.reshape(batch, num_heads, length, -1), 1, 2)
    of_heads = None if lengths is None else jnp.repeat(lengths, num_heads).reshape(n // size, size)
    inputs = (of_heads, *(split(x) for x in arrays))
    if size == n:
        return jax.tree.map(lambda x: join(x[None]), fn(*jax.tree.map(lambda x: x[0], inputs)))
    return jax.tree.map(join, jax.lax.map(lambda block: fn(*block), inputs))


ATTENTIONS = {"plain": plain, "cudnn": cudnn, "splash": splash}
