"""Collectives of programs whose communication is known."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.model import networks
from sedd_jax.performance import collectives
from sedd_jax.runtime import sharding
from sedd_jax.training import train_steps

# Compiles steps for many meshes.
pytestmark = pytest.mark.slow


def compiled(fn, in_specs, out_specs, *shapes):
    """HLO of fn, which each of 8 devices runs on its shard."""
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=4))
    with jax.set_mesh(mesh):
        mapped = jax.jit(jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=False))
        inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return mapped.lower(*inputs).compile().as_text()


ROWS = PartitionSpec("fsdp")


@pytest.mark.parametrize(
    ("fn", "out_specs", "kind", "shape", "bytes_sent"),
    [
        # A device holds [4, 8] of [16, 8] float32: 128 of 512 bytes.
        (lambda x: jax.lax.psum(x, "fsdp"), PartitionSpec(), "all-reduce", (4, 8), 2 * 128 * 3 / 4),
        (lambda x: jax.lax.all_gather(x, "fsdp", tiled=True), PartitionSpec(), "all-gather", (16, 8), 3 * 128),
        (lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True), ROWS, "reduce-scatter", (1, 8), 3 * 32),
        (lambda x: jax.lax.all_to_all(x, "fsdp", 0, 1, tiled=True), ROWS, "all-to-all", (1, 8), 3 * 32),
        (
            lambda x: jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]),
            ROWS,
            "collective-permute",
            (4, 8),
            128,
        ),
    ],
    ids=["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"],
)
def test_each_kind(fn, out_specs, kind, shape, bytes_sent):
    (found,) = collectives.collectives(compiled(fn, ROWS, out_specs, (16, 8)))
    assert (found.kind, found.times) == (kind, 1)
    assert found.shapes[0] == ("f32", shape)
    assert found.bytes_sent == bytes_sent


def test_group_is_that_of_the_named_axes():
    text = compiled(lambda x: jax.lax.psum(x, ("data", "fsdp")), ROWS, PartitionSpec(), (16, 8))
    assert [found.group_size for found in collectives.collectives(text)] == [8]


def test_loops_multiply():
    def nested(x):
        inner = lambda _, x: jax.lax.psum(x, "fsdp") * 0.5
        return jax.lax.fori_loop(0, 3, lambda _, x: jax.lax.fori_loop(0, 5, inner, x) + 1, x)

    found = collectives.collectives(compiled(nested, PartitionSpec(), PartitionSpec(), (64, 8)))
    assert sum(one.times for one in found if one.shapes[0][1] == (64, 8)) == 15


def test_an_operation_cut_into_pieces_counts_once():
    piece = (
        "  %a.{} = bf16[1,768]{{1,0:T(8,128)(2,1)}} all-gather(%p), channel_id=7, "
        "replica_groups=mesh['axis_0'=16] {{'axis_0'}}"
    )
    started = (
        "  %s = (f32[4]{0}, f32[64]{0}, u32[], u32[]) all-gather-start(%p), channel_id=8, replica_groups=[2,16]<=[32]"
    )
    found = collectives.collectives("\n".join([piece.format(1), piece.format(2), started]))
    assert [(one.shapes, one.group_size) for one in found] == [
        ((("bf16", (1, 768)),), 16),
        ((("f32", (64,)),), 16),
    ]


SLICES = """
%all-reduce-scatter.1 (input: f32[1024]) -> f32[256] {
  %sum = f32[1024]{0} all-reduce(%input), channel_id=3, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %part = f32[256]{0} dynamic-slice(%sum, %i), dynamic_slice_sizes={256}
}
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %c = f32[4,256]{1,0} all-reduce(%x), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add
  %s = (bf16[64,8]{1,0}, u32[], token[]) send(%y, %z), channel_id=6, as={_xla_megascale_transfer_type="ALL_REDUCE"}
  %r = (bf16[64,8]{1,0}, u32[], token[]) recv(%z), channel_id=5, as={_xla_megascale_transfer_type="ALL_REDUCE"}
}
%condition (p: (s32[], f32[8])) -> pred[] {
  %most = s32[]{:T(128)} constant(4)
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %one = s32[]{:T(128)} constant(1)
  %copied = s32[]{:T(128)} copy(%one)
  %start = (s32[]{:T(128)}, f32[8]{0}) tuple(%copied, %p)
  %loop = (s32[]{:T(128)}, f32[8]{0}) while(%start), condition=%condition, body=%body
  %fused = f32[256]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %scattered = f32[32,128]{1,0} reduce-scatter(%x), channel_id=2, replica_groups={{0,1,2,3}}, dimensions={0}
  %gathered = f32[128,128]{1,0} all-gather(%x), channel_id=2, replica_groups={{0,1,2,3}}, dimensions={0}
  %whole = (f32[16]{0}, u32[], token[]) send(%y, %z), channel_id=8, as={_xla_megascale_transfer_type="ALL_GATHER"}
}
"""


def test_between_slices_and_in_a_loop_whose_first_round_was_peeled_off():
    """HLO as libtpu writes it for two slices: each device sends its share of a sum, and the sums are gathered."""
    found = collectives.collectives(SLICES, num_slices=4)
    assert [(one.kind, one.group_size, one.times, one.between_slices, one.bytes_sent) for one in found] == [
        ("all-reduce", 4, 3, False, 3 * 2 * 3 / 4 * 4 * 256 * 4),
        ("all-reduce", 4, 3, True, 3 * 2 * 3 / 4 * 64 * 8 * 2),
        ("reduce-scatter", 4, 1, False, 3 * 256 * 4),
        ("reduce-scatter", 4, 1, False, 3 * 32 * 128 * 4),
        ("all-gather", 4, 1, False, 3 / 4 * 128 * 128 * 4),
        ("all-gather", 4, 1, True, 3 * 16 * 4),
    ]


GPUS = """
ENTRY %main (p: f32[8]) -> f32[8] {
  %g = ((f32[4]{0}, f32[8]{0}), (f32[32]{0}, f32[64]{0})) all-gather-start(%a), replica_groups={{0,1,2,3,4,5,6,7},{8}}
  %s = ((bf16[64]{0}), bf16[8]{0}) reduce-scatter-start(%c), channel_id=2, replica_groups=[2,8]<=[16], dimensions={0}
  %r = f32[100]{0} all-reduce-start(%d), replica_groups=mesh['a'=8,'b'=1,'c'=2], device_ids=([2,8]T(1,0)) {'c'}
  %w = f32[100]{0} all-reduce-start(%d), channel_id=4, replica_groups=mesh['a'=16,'b'=1] {'a'}
  %t = f32[100]{0} all-reduce-start(%d), channel_id=5, replica_groups=[8,2]<=[2,8]T(1,0)
}
"""


def test_gpus_of_two_hosts_send_what_leaves_a_host_once():
    """NCCL's operations as XLA writes them for two hosts of 8 GPUs, in each notation of groups."""
    gathered, scattered, *summed = collectives.collectives(GPUS, host_devices=8)
    assert (gathered.kind, gathered.group_size, gathered.bytes_sent) == ("all-gather", 8, 7 / 8 * 4 * 96)
    assert (scattered.kind, scattered.shapes, scattered.bytes_sent) == ("reduce-scatter", (("bf16", (8,)),), 7 * 16)
    assert gathered.num_hosts == scattered.num_hosts == 1
    assert gathered.bytes_between_hosts == 0
    # Peers of the other host; all 16, whose ring leaves a host at one of 8 GPUs; peers again.
    assert [(one.group_size, one.num_hosts) for one in summed] == [(2, 2), (16, 2), (2, 2)]
    assert [one.bytes_between_hosts for one in summed] == [400, 2 * 15 / 16 * 400 / 8, 400]
    assert [one.bytes_within_hosts for one in summed] == [0, 2 * 15 / 16 * 400, 0]


@functools.cache
def step_text(shape):
    """HLO of a training step of a tiny network, compiled for a mesh of this shape."""
    config = configs.parse(
        configs.merge(
            {
                "data": {"length": 24},
                "network": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "cond_dim": 16, "dtype": "float32"},
                "training": {"batch_size": 16},
                "mesh": dict(zip(sharding.AXES, shape, strict=True)),
            }
        )
    )
    return (
        train_steps.lower_step(runs.unsaved(config, vocab_size=1023), sharding.make_mesh(config.mesh))[1]
        .compile()
        .as_text()
    )


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (2, 2, 2)], ids=str)
def test_a_step_sends_nothing_of_positions_times_vocabulary(shape, capfd):
    """Logits of a device's share of the batch would have at least 16 / 8 x 24 x 1024 / 2 elements."""
    text = step_text(shape)
    assert "nvoluntary full rematerialization" not in capfd.readouterr().err
    found = collectives.collectives(text)
    assert found
    for one in found:
        for _, sizes in one.shapes:
            assert not (1024 in sizes or 512 in sizes) or len(sizes) <= 2
            # The largest arrays are the embedding, the head, and the matrices of the blocks, single or stacked.
            assert math.prod(sizes) <= 1024 * 32, one


def test_copies_of_the_model_exchange_their_gradients_once():
    """Each device sends 2 (8 - 1) / 8 times the 4 bytes of every parameter, and a few sums."""
    config = networks.NetworkConfig(
        num_states=1024, hidden_size=32, num_layers=2, num_heads=4, cond_dim=16, dtype="float32"
    )
    shapes = jax.eval_shape(lambda: networks.init(jax.random.key(0), config))
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    sent = sum(one.bytes_sent for one in collectives.collectives(step_text((8, 1, 1))))
    assert 1 <= sent / (2 * 7 / 8 * 4 * num_parameters) < 1.02
