"""Tiles: computes the head's matrix product for some positions by some states at a time, never as a whole.

States are split into blocks of equal width. Chosen positions are gathered to the front as rows, and visited in chunks.
A loop over both holds one tile of logits at a time, and ends with the last chosen row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int


class States(NamedTuple):
    """A block of v states.

    Attributes:
        ids: ids of the states; -1 for padding, and for states that were already in the block before.
        start: index at which the block starts in this device's part of the head.
        kernel: columns of the head's kernel for these states.
        bias: biases of these states.
        precision: precision of products of float32 arrays.
    """

    ids: Int[Array, " v"]
    start: Int[Array, ""]
    kernel: Float[Array, "D v"]
    bias: Float[Array, " v"]
    precision: jax.lax.Precision

    def logits(self, features: Float[Array, "*r D"]) -> Float[Array, "*r v"]:
        return head_product(features, self.kernel, self.bias, self.precision)

    def other_than(self, x: Int[Array, " r"]) -> Bool[Array, "r v"]:
        return (self.ids >= 0)[None] & (self.ids[None] != x[:, None])

    def equal_to(self, x: Int[Array, " r"]) -> Bool[Array, "r v"]:
        return self.ids[None] == x[:, None]


class Vocabulary(NamedTuple):
    """One device's part of the head, in blocks of `width` states. The last block overlaps the one before it if needed.

    Attributes:
        kernel: the device's columns of the head's kernel.
        bias: the device's biases.
        first: id of the device's first state.
        num_states: number V of real states on all devices; states from V on are padding.
        width: states in a block.
        precision: precision of products of float32 arrays.
    """

    kernel: Float[Array, "D P"]
    bias: Float[Array, " P"]
    first: Int[Array, ""] | int
    num_states: int
    width: int
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST

    @property
    def num_blocks(self) -> int:
        return -(-len(self.bias) // self.width)

    def block(self, k: Int[Array, ""]) -> States:
        start = jnp.minimum(k * self.width, len(self.bias) - self.width)
        places = start + jnp.arange(self.width)
        states = self.first + places
        return States(
            ids=jnp.where((places >= k * self.width) & (states < self.num_states), states, -1),
            start=start,
            kernel=jax.lax.dynamic_slice_in_dim(self.kernel, start, self.width, axis=1),
            bias=jax.lax.dynamic_slice_in_dim(self.bias, start, self.width),
            precision=self.precision,
        )


class Rows(NamedTuple):
    """Chosen positions of [B, L], gathered to the front, to be visited in chunks of `size`.

    Attributes:
        order: indices of the rows in the flattened array [B L]. After the last row they are out of range, so nothing is
            read or written there.
        count: number of chosen positions.
        size: number of rows in a chunk.
    """

    order: Int[Array, " n"]
    count: Int[Array, ""]
    size: int

    def gather(self, x: Array) -> Array:
        """The chosen positions of x [B, L, ...] as rows [n, ...]; zeros after the last."""
        return x.reshape(-1, *x.shape[2:]).at[self.order].get(mode="fill", fill_value=0)

    def scatter(self, rows: Array, shape: tuple[int, ...]) -> Array:
        """An array [B, L, ...] = `shape` + ... with the rows at their positions; zeros elsewhere."""
        flat = jnp.zeros((shape[0] * shape[1], *rows.shape[1:]), rows.dtype)
        return flat.at[self.order].set(rows, mode="drop").reshape(*shape, *rows.shape[1:])

    def chunk(self, rows: Array, i: Int[Array, ""]) -> Array:
        return jax.lax.dynamic_slice_in_dim(rows, i, self.size)

    def visit(self, body: Callable[[Int[Array, ""], Any], Any], carry: Any) -> Any:
        """Runs body(i, carry) for the start i of every chunk that holds a chosen row."""
        # The loop counts in steps of 1: for any other step size, XLA of jaxlib 0.10 rounds the number of steps down.
        return jax.lax.fori_loop(0, -(-self.count // self.size), lambda n, carry: body(n * self.size, carry), carry)


def choose(chosen: Bool[Array, "B L"], size: int) -> Rows:
    """The chosen positions as `Rows`, in chunks of `size`."""
    padded = -(-chosen.size // size) * size
    order = jnp.nonzero(chosen.reshape(-1), size=padded, fill_value=chosen.size)[0]
    return Rows(order=order, count=chosen.sum(dtype=jnp.int32), size=size)


def chunk_size(num_positions: int, most: int) -> int:
    """Number of rows in a chunk: an eighth of the positions, so that the last chunk wastes few rows.

    It is at least 128 (or all positions, if fewer), and at most `most` if that is at least 128.
    """
    return min(num_positions, max(128, min(num_positions // 8, most)))


def put(x: Array, new: Array, i: Int[Array, ""]) -> Array:
    """x with `new` written over its rows from row i on."""
    return jax.lax.dynamic_update_slice_in_dim(x, new, i, axis=0)


def fold(vocabulary: Vocabulary, rows: Rows, start: tuple[float, ...], step: Callable[..., Any]) -> tuple[Array, ...]:
    """Numbers of each row, begun at `start` and renewed by every block of states.

    Args:
        vocabulary: the blocks.
        rows: the rows, visited in chunks.
        start: first value of each number.
        step: (states of a block, start of a chunk, numbers of its rows...) -> new numbers.
    """

    def visit_block(k: Int[Array, ""], found: tuple[Array, ...]) -> tuple[Array, ...]:
        states = vocabulary.block(k)

        def visit(i: Int[Array, ""], found: tuple[Array, ...]) -> tuple[Array, ...]:
            new = step(states, i, *(rows.chunk(x, i) for x in found))
            return tuple(put(x, y, i) for x, y in zip(found, new, strict=True))

        return rows.visit(visit, found)

    first = tuple(jnp.full(len(rows.order), number) for number in start)
    return jax.lax.fori_loop(0, vocabulary.num_blocks, visit_block, first)


def head_product(
    features: Float[Array, "*r D"],
    kernel: Float[Array, "D v"],
    bias: Float[Array, " v"],
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST,
) -> Array:
    """features @ kernel + bias, [*r, v], accumulated in float32."""
    z = jnp.dot(features, kernel, precision=precision, preferred_element_type=jnp.float32)
    return z + bias.reshape((1,) * (z.ndim - 1) + (-1,))


def kernel_spec(batch: tuple[str, ...], tensor: tuple[str, ...]) -> PartitionSpec:
    """How the gradient of the head's kernel is split over devices."""
    return PartitionSpec("fsdp" if "fsdp" in batch else None, tensor)


def add_kernels(of_kernel: Float[Array, "D P"], batch: tuple[str, ...]) -> Float[Array, "d P"]:
    """The sum of all devices' gradients of the head's kernel; under fsdp each device gets its rows."""
    if "fsdp" in batch:
        of_kernel = jax.lax.psum_scatter(of_kernel, "fsdp", scatter_dimension=0, tiled=True)
    return jax.lax.psum(of_kernel, tuple(axis for axis in batch if axis != "fsdp"))
