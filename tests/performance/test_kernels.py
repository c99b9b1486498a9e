"""Kernels of compiled programs: their kinds, bytes and operations."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax.performance import hlo, kernels


def only(text, head_share=0.5):
    """The kernel of a program that has one."""
    (found,), _ = kernels.kernels(text, head_share)
    return found


def program(line, parameters, before=""):
    declared = "\n".join(f"  %p{i} = {array} parameter({i})" for i, array in enumerate(parameters))
    return f"{before}\nENTRY %main (x: f32[]) -> f32[] {{\n{declared}\n  ROOT %out = {line}\n}}\n"


def test_a_scan_on_this_machine_counts_every_turn():
    """Five products of [16, 32] by [32, 32], and no kernel but these has FLOPs."""
    step = lambda x, _: (jnp.tanh(x @ jnp.ones((32, 32))), x.sum())
    text = jax.jit(lambda x: jax.lax.scan(step, x, None, length=5)).lower(jnp.ones((16, 32))).compile().as_text()
    found, waits = kernels.kernels(text, 0.5)
    assert sum(one.calls * one.flops for one in found) == 5 * 2 * 16 * 32 * 32
    assert {one.kind for one in found if one.flops} == {"products"}
    assert waits == 0


PRODUCT = (
    'f32[64,8]{1,0} custom-call(%p0, %p1), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":'
)
PRODUCT += '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}'
ATTENTION = "(bf16[2,4,16,8]{3,2,1,0}, u8[99]{0}) custom-call(%p0, %p0, %p0), custom_call_target="
ROWS = ["bf16[2,16,4,8]{3,2,1,0}"]


@pytest.mark.parametrize(
    ("text", "kind", "flops", "written"),
    [
        (program(PRODUCT, ["f32[64,32]{1,0}", "f32[32,8]{1,0}"]), "products", 2 * 64 * 32 * 8, 4 * 64 * 8),
        # Queries by keys and weights by values: two products of 16 x 16 x 8 for each of 2 x 4 heads.
        (program(ATTENTION + '"__cudnn$fmhaSoftmax"', ROWS), "attention", 2 * 2 * 8 * 16 * 16 * 8, 2 * 2 * 4 * 16 * 8),
        (
            program(ATTENTION + '"__cudnn$fmhaSoftmaxBackward"', ROWS),
            "attention, gradient",
            5 * 2 * 8 * 16 * 16 * 8,
            2 * 2 * 4 * 16 * 8,
        ),
        (
            program("f32[64]{0} broadcast(%c), dimensions={}", []).replace(
                "  ROOT", "  %c = f32[] constant(0)\n  ROOT"
            ),
            "fills",
            0,
            256,
        ),
        (program("f32[8,4]{1,0} transpose(%p0), dimensions={1,0}", ["f32[4,8]{1,0}"]), "copies", 0, 128),
        (program("f32[4,8]{1,0} add(%p0, %p0)", ["f32[4,8]{1,0}"]), "elementwise", 0, 128),
        (
            program("f32[4,8]{1,0:S(1)} copy(%p0)", ["f32[4,8]{1,0}"]),
            "transfers",
            0,
            0,
        ),
    ],
)
def test_kinds(text, kind, flops, written):
    found = only(text)
    assert (found.kind, found.flops, found.bytes_written) == (kind, flops, written)


@pytest.mark.parametrize(("name", "products"), [("splash_mha_fwd_residuals.1", 2), ("splash_mha_dkv_no_residuals", 4)])
@pytest.mark.parametrize("batch", ["", "3,"])
def test_attention_of_a_tpu(name, products, batch):
    """A batch of one has no axis; tables of what to skip come first."""
    line = f'bf16[{batch}2,16,8] custom-call(%p0, %p1, %p1, %p1), custom_call_target="tpu_custom_call"'
    found = only(program(line, ["s8[1,2,2]", f"bf16[{batch}2,16,8]"]).replace("%out", f"%{name}"))
    assert found.flops == products * 2 * (3 if batch else 1) * 2 * 16 * 16 * 8


def test_instructions_that_run_nothing_are_no_kernels():
    text = program("(f32[4]{0}) tuple(%p0)", ["f32[4]{0}"])
    sums = "  %sum = f32[4]{0} all-reduce-start(%p0), replica_groups={{0,1}}\n  ROOT"
    assert kernels.kernels(text.replace("  ROOT", sums), 0.5) == ([], 0)


def places(size, kernel, stride, low, high, spread, apart):
    """Pairs of places of a padded, dilated axis and of its window, written out."""
    axis = np.full((size - 1) * spread + 1, np.nan)
    axis[::spread] = 1
    axis = np.concatenate([np.full(low, np.nan), axis, np.full(high, np.nan)])
    starts = range(0, len(axis) - (kernel - 1) * apart, stride)
    return sum(not np.isnan(axis[start + k * apart]) for start in starts for k in range(kernel))


@pytest.mark.parametrize(
    ("window", "lhs", "rhs", "labels", "out", "flops"),
    [
        ("", "[32,64]", "[64,8]", "bf_io->bf", "[32,8]", 2 * 32 * 64 * 8),
        # A sum over 32 sequences and 16 positions.
        ("size=32", "[32,16,4]", "[32,16,8]", "0fb_0io->bf0", "[4,8,1]", 2 * 32 * 16 * 4 * 8),
        # A product for each of 32 sequences: of the padded window one place counts.
        (
            "size=32 pad=31_31 rhs_reversal=1",
            "[64,16,1]",
            "[32,8,64]",
            "fb0_0oi->0fb",
            "[32,8,16]",
            2 * 32 * 16 * 8 * 64,
        ),
        (
            "size=1x12 pad=0_0x11_11 rhs_reversal=0x1",
            "[2,16,64,1]",
            "[12,8,64,1]",
            "0bf1_1oi0->0b1f",
            "[2,16,12,8]",
            2 * 2 * 16 * 12 * 8 * 64,
        ),
    ],
)
def test_products_of_a_tpu_are_convolutions(window, lhs, rhs, labels, out, flops):
    window = f", window={{{window}}}" if window else ""
    found = only(program(f"f32{out} convolution(%p0, %p1){window}, dim_labels={labels}", [f"bf16{lhs}", f"bf16{rhs}"]))
    assert found.flops == flops


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "low", "high", "spread", "apart"),
    [x for x in itertools.product((1, 5), (1, 3), (1, 2), (0, 2), (0, 1), (1, 3), (1, 2)) if x[0] + x[3] + x[4] > 4],
)
def test_a_window_counts_places_that_are_not_padding(size, kernel, stride, low, high, spread, apart):
    length = (size - 1) * spread + 1 + low + high - (kernel - 1) * apart
    if length < 1:
        pytest.skip("the window is wider than the axis")
    out = (length - 1) // stride + 1
    line = (
        f"f32[2,7,{out}] convolution(%p0, %p1), window={{size={kernel} stride={stride} pad={low}_{high} "
        f"lhs_dilate={spread} rhs_dilate={apart}}}, dim_labels=bf0_io0->bf0"
    )
    found = only(program(line, [f"f32[2,3,{size}]", f"f32[3,7,{kernel}]"]))
    assert found.flops == 2 * 2 * 3 * 7 * places(size, kernel, stride, low, high, spread, apart)


CHUNKS = """
%body (b: (s32[1000], s32[])) -> (s32[1000], s32[]) {
  %b = (s32[1000]{0}, s32[]) parameter(0)
  %tokens = s32[1000]{0} get-tuple-element(%b), index=0
  %i = s32[] get-tuple-element(%b), index=1
  %chunk = s32[200]{0} dynamic-slice(%tokens, %i), dynamic_slice_sizes={200}
  ROOT %next = (s32[1000]{0}, s32[]) tuple(%tokens, %i)
}

%condition (c: (s32[1000], s32[])) -> pred[] {
  %c = (s32[1000]{0}, s32[]) parameter(0)
  %j = s32[] get-tuple-element(%c), index=1
  ROOT %less = pred[] compare(%j, %j), direction=LT
}

ENTRY %main (p: (s32[1000], s32[])) -> (s32[1000], s32[]) {
  %p = (s32[1000]{0}, s32[]) parameter(0)
  ROOT %loop = (s32[1000]{0}, s32[]) while(%p), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(("share", "turns"), [(0.5, 3.0), (1.0, 5.5)])
def test_a_loop_over_chunks_of_tokens_turns_by_their_share_and_asks_the_host(share, turns):
    found, waits = kernels.kernels(CHUNKS, share)
    assert {one.name: one.calls for one in found} == {"chunk": turns, "less": turns + 1}
    assert waits == turns + 1


@pytest.mark.parametrize(
    ("where", "scope"),
    [
        ("jit(train_step)/jvp(ScoreNetwork)/blocks/mul", "layers, forward"),
        ("jit(train_step)/transpose(jvp(ScoreNetwork))/blocks/mul", "layers, backward"),
        ("jit(train_step)/transpose(jvp(ScoreNetwork))/rematted_computation/blocks/mul", "layers, recomputed"),
        ("jit(train_step)/jvp()/shard_map/while/body/dot_general", "head"),
        ("jit(train_step)/mul", "optimizer, noise"),
    ],
)
def test_scopes(where, scope):
    line = f'f32[4]{{0}} add(%p0, %p0), metadata={{op_name="{where}"}}'
    assert only(program(line, ["f32[4]{0}"])).scope == scope


def test_what_the_compiler_adds_belongs_to_the_kernel_before_it():
    text = program("f32[4]{0} copy(%sum)", ["f32[4]{0}"])
    named = '  %sum = f32[4]{0} add(%p0, %p0), metadata={op_name="jit(f)/jvp(ScoreNetwork)/add"}\n  ROOT'
    found, _ = kernels.kernels(text.replace("  ROOT", named), 0.5)
    assert [one.scope for one in found] == ["layers, forward"] * 2


def test_triton_is_told_from_other_custom_fusions():
    before = "%fused (x: f32[4]) -> f32[4] {\n  %x = f32[4]{0} parameter(0)\n  ROOT %y = f32[4]{0} exponential(%x)\n}\n"
    line = 'f32[4]{0} fusion(%p0), kind=kCustom, calls=%fused, backend_config={"fusion_backend_config":{"kind":"KIND"}}'
    triton, other = (only(program(line.replace("KIND", kind), ["f32[4]{0}"], before)) for kind in ("__triton", "x"))
    assert (triton.is_triton, other.is_triton) == (True, False)
    assert triton.operations == 8 * 4
    assert triton.arrays == (hlo.Array("f32", (4,), "0"),)
