"""Attention between all positions of a sequence, or to those up to one's own, by what each platform does best.

Every implementation maps queries, keys and values [B, L, H, K] to [B, L, H, K], and its softmax is float32. Where it is
given the number of tokens of each sequence, nobody attends to the padding after them, and what stands there does not
matter. Under a mesh each device attends for its own sequences and heads.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from sedd_jax.runtime import sharding

# Scores (sequences x heads x L x L) that `plain` holds at once: on a CPU what its caches hold.
BLOCK_SCORES = {"cpu": 1 << 21, "gpu": 1 << 30, "tpu": 1 << 30}
TPU_LANES = 128
# What rematerialisation may keep of attention, by `jax.checkpoint_policies.save_only_these_names`.
RESIDUALS = "attention"


def attend(
    qkv: Float[Array, "B L Q"],
    num_heads: int,
    implementation: str,
    *,
    causal: bool = False,
    lengths: Int[Array, "B"] | None = None,
) -> Float[Array, "B L D"]:
    """Multi-head attention with rotary positions on queries and keys.

    Args:
        qkv: queries, keys and values of all heads, one after the other.
        num_heads: heads H.
        implementation: a name in `ATTENTIONS`, or "auto" for the fastest that the platform has.
        causal: whether a position attends to those up to itself only.
        lengths: tokens of each sequence, at least 1; what follows is padding, whose own output means nothing and is
            finite. All are tokens if None.

    Raises:
        ValueError: where the implementation cannot run on this platform or these shapes.
    """
    batch, length, width = qkv.shape
    q_BLHK, k_BLHK, v_BLHK = (x.reshape(batch, length, num_heads, -1) for x in jnp.split(qkv, 3, axis=-1))
    batch_axes, tensor = sharding.mapped_axes(batch)
    spec = PartitionSpec(batch_axes, None, tensor if num_heads % sharding.axis_size(tensor) == 0 else ())
    attention = functools.partial(ATTENTIONS[resolve(implementation, length, qkv.dtype)], causal=causal)
    inputs, specs = (rotate(q_BLHK), rotate(k_BLHK), v_BLHK), (spec,) * 3
    if lengths is not None:
        inputs, specs = (*inputs, lengths), (*specs, PartitionSpec(batch_axes))
    return sharding.per_device(attention, specs, spec)(*inputs).reshape(batch, length, width // 3)


def resolve(implementation: str, length: int, dtype: Any) -> str:
    """The implementation itself, or where it is "auto" the fastest of the current platform."""
    return choose(sharding.platform(), length, dtype) if implementation == "auto" else implementation


def choose(platform: str, length: int, dtype: Any) -> str:
    """The fastest implementation for a platform: cuDNN's knows half precision only, splash whole rows of 128 lanes."""
    if platform == "gpu" and dtype == jnp.bfloat16:
        return "cudnn"
    if platform == "tpu" and length % TPU_LANES == 0:
        return "splash"
    return "plain"


def rotate(x: Float[Array, "B L H K"]) -> Float[Array, "B L H K"]:
    """Rotary positions (Su et al. 2021), pairing feature j with j + K/2, base 10000."""
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
) -> Array:
    """cuDNN's fused attention: NVIDIA GPUs from Ampere on, bfloat16."""
    _need("cudnn", "gpu")
    if q.dtype != jnp.bfloat16:
        raise ValueError(
            f"config.network.attention=cudnn needs bfloat16, not {q.dtype}: set config.network.dtype=bfloat16"
        )
    if lengths is None:
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
    is_token = _is_token(lengths, k.shape[1])[:, :, None, None]
    # cuDNN does not say what it leaves where it skips: it computes all queries, and keys and values of padding are 0.
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
    interpret: bool = False,
) -> Array:
    """The Pallas splash attention kernel: TPUs, lengths divisible by 128.

    Args:
        q: queries.
        k: keys.
        v: values.
        lengths: tokens of each sequence; all if None.
        causal: whether a position attends to those up to itself only.
        interpret: run the kernel step by step on any platform, for tests.
    """
    length, num_heads, size = q.shape[1:]
    if not interpret:
        _need("splash", "tpu")
    if length % TPU_LANES:
        raise ValueError(
            f"config.network.attention=splash needs a length divisible by {TPU_LANES}, not config.data.length="
            f"{length}: set config.network.attention=plain"
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
        # A query attends to keys of its own segment: all queries are of the segment of the tokens.
        is_token = _is_token(lengths, length).astype(jnp.int32)
        inputs = (*inputs, splash_attention.SegmentIds(q=jnp.ones_like(is_token), kv=is_token))
    out: Any = jax.vmap(kernel)(*inputs)
    return heads_first(out)


def _need(implementation: str, platform: str) -> None:
    if sharding.platform() != platform:
        raise ValueError(
            f"config.network.attention={implementation} runs on a {platform.upper()}, not on this machine's "
            f"{sharding.platform().upper()}: set config.network.attention=auto"
        )


def _is_token(lengths: Int[Array, " n"], length: int) -> Bool[Array, "n L"]:
    """Which of `length` positions are before the padding."""
    return jnp.arange(length)[None] < lengths[:, None]


def plain(
    q: Float[Array, "B L H K"],
    k: Float[Array, "B L H K"],
    v: Float[Array, "B L H K"],
    lengths: Int[Array, "B"] | None = None,
    *,
    causal: bool = False,
) -> Any:
    """Softmax attention as matrix products, some heads at a time, the scores computed again for the gradient.

    Blocks of heads keep the scores in a CPU's caches (twice as fast there), and memory linear in the length.
    """
    return _plain(causal, q, k, v, lengths)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _plain(causal: bool, q: Any, k: Any, v: Any, lengths: Any) -> Any:
    return _plain_forward(causal, q, k, v, lengths)[0]


def _plain_forward(causal: bool, q: Any, k: Any, v: Any, lengths: Any) -> tuple[Any, Any]:
    attend_block = functools.partial(_attend_block, causal)
    out, logsumexp = checkpoint_name(_by_blocks(attend_block, lengths, q, k, v), RESIDUALS)
    return out, (lengths, q, k, v, out, logsumexp)


def _plain_backward(causal: bool, residuals: Any, gradient: Any) -> tuple[Any, ...]:
    return *_by_blocks(functools.partial(_differentiate_block, causal), *residuals, gradient), None


_plain.defvjp(_plain_forward, _plain_backward)


def _scores(
    causal: bool, lengths: Int[Array, " n"] | None, q: Float[Array, "n L K"], k: Float[Array, "n L K"]
) -> Float[Array, "n L L"]:
    """Products of queries, scaled before, and keys; -inf where a query may not look."""
    scores = _product("nqk,nsk->nqs", q, k)
    if causal:
        positions = jnp.arange(q.shape[1])
        scores = jnp.where((positions[:, None] >= positions[None])[None], scores, -jnp.inf)
    return scores if lengths is None else jnp.where(_is_token(lengths, q.shape[1])[:, None], scores, -jnp.inf)


def _attend_block(
    causal: bool,
    lengths: Int[Array, " n"] | None,
    q: Float[Array, "n L K"],
    k: Float[Array, "n L K"],
    v: Float[Array, "n L K"],
) -> tuple[Any, Any]:
    scores = _scores(causal, lengths, q * (1 / math.sqrt(q.shape[-1])), k)
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - top)
    mass = weights.sum(-1, keepdims=True)
    out = _product("nqs,nsk->nqk", weights.astype(v.dtype), v) / mass
    return out.astype(v.dtype), top + jnp.log(mass)


def _differentiate_block(
    causal: bool,
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
    probs = jnp.exp(_scores(causal, lengths, q, k) - logsumexp)
    along = (gradient.astype(jnp.float32) * out).sum(-1, keepdims=True)
    of_scores = probs * (_product("nqk,nsk->nqs", gradient, v) - along)
    of_scores, probs = of_scores.astype(q.dtype), probs.astype(q.dtype)
    of_q = _product("nqs,nsk->nqk", of_scores, k) * scale
    of_k = _product("nqs,nqk->nsk", of_scores, q)
    of_v = _product("nqs,nqk->nsk", probs, gradient)
    return tuple(x.astype(q.dtype) for x in (of_q, of_k, of_v))


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _by_blocks(fn: Any, lengths: Any, *arrays: Any) -> Any:
    """fn(lengths, *arrays) of arrays [n, L, K] that hold as many heads n at a time as their scores allow."""
    batch, length, num_heads = arrays[0].shape[:3]
    n = batch * num_heads
    most = max(1, BLOCK_SCORES[sharding.platform()] // length**2)
    # Where the batch has no size yet (`jax.export`), the heads of one sequence.
    size = next(size for size in range(min(most, n), 0, -1) if n % size == 0) if isinstance(n, int) else num_heads
    split = lambda x: jnp.swapaxes(x, 1, 2).reshape(n // size, size, length, -1)
    join = lambda x: jnp.swapaxes(x.reshape(batch, num_heads, length, -1), 1, 2)
    of_heads = None if lengths is None else jnp.repeat(lengths, num_heads).reshape(n // size, size)
    inputs = (of_heads, *(split(x) for x in arrays))
    if size == n:
        return jax.tree.map(lambda x: join(x[None]), fn(*jax.tree.map(lambda x: x[0], inputs)))
    return jax.tree.map(join, jax.lax.map(lambda block: fn(*block), inputs))


ATTENTIONS = {"plain": plain, "cudnn": cudnn, "splash": splash}
