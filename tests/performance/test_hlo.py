"""Texts of compiled programs, with sizes that can be counted by hand."""

import pytest

from sedd_jax.performance import hlo

# A layer is cut from a stack of 12, and added to. The sum goes back into its place.
STACK = """
HloModule step

%inner (a: f32[12,8,4], i: s32[]) -> f32[1,8,4] {
  %a = f32[12,8,4]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %cut = f32[1,8,4]{2,1,0} dynamic-slice(%a, %i, %zero, %zero), dynamic_slice_sizes={1,8,4}
}

%fused (stack: f32[12,8,4], step: f32[1,8,4], place: s32[]) -> f32[12,8,4] {
  %step = f32[1,8,4]{2,1,0} parameter(1)
  %stack = f32[12,8,4]{2,1,0} parameter(0)
  %place = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  %layer = f32[1,8,4]{2,1,0} fusion(%stack, %place), kind=kLoop, calls=%inner
  %sum = f32[1,8,4]{2,1,0} add(%layer, %step)
  ROOT %updated = f32[12,8,4]{2,1,0} dynamic-update-slice(%stack, %sum, %place, %zero.1, %zero.1)
}

ENTRY %main (p0: f32[12,8,4], p1: f32[1,8,4], p2: s32[]) -> f32[12,8,4] {
  %p0 = f32[12,8,4]{2,1,0} parameter(0)
  %p1 = f32[1,8,4]{2,1,0} parameter(1)
  %p2 = s32[] parameter(2)
  ROOT %out = f32[12,8,4]{2,1,0} fusion(%p0, %p1, %p2), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/add"}
}
"""


def test_a_layer_of_a_stack_is_all_that_a_fusion_reads_and_writes():
    (*_, out) = hlo.parse(STACK).entry.instructions
    layer = 4 * 8 * 4
    # The layer, what is added to it, and its place.
    assert out.bytes_read == 2 * layer + 4
    assert out.bytes_written == layer
    assert out.attribute(r'op_name="([^"]*)"') == "jit(step)/add"
    assert [part.opcode for part in out.parts()].count("dynamic-slice") == 1


def test_of_what_is_converted_first_a_fusion_reads_the_layer_that_it_cuts():
    cut = "  %half = bf16[12,8,4]{2,1,0} convert(%a)\n  ROOT %cut = bf16[1,8,4]{2,1,0} dynamic-slice(%half"
    text = STACK.replace("  ROOT %cut = f32[1,8,4]{2,1,0} dynamic-slice(%a", cut)
    (*_, out) = hlo.parse(text).entry.instructions
    assert out.bytes_read == 2 * 4 * 8 * 4 + 4


@pytest.mark.parametrize(
    ("array", "num_bytes"),
    [
        (hlo.Array("f32", (3, 5)), 60),
        (hlo.Array("bf16", (3, 5), "1,0"), 30),
        (hlo.Array("pred", ()), 1),
        # A TPU's tile is 8 x 128, of the two axes that change fastest.
        (hlo.Array("f32", (32, 12, 64), "2,1,0:T(8,128)"), 4 * 32 * 16 * 128),
        (hlo.Array("bf16", (32, 12, 64), "0,2,1:T(8,128)(2,1)"), 2 * 128 * 12 * 64),
        (hlo.Array("f32", (1000,), "0:T(1024)"), 4096),
        (hlo.Array("f32", (32, 64), "1,0:T(8,128)S(1)"), 0),
        (hlo.Array("f8e4m3fn", (7,)), 7),
    ],
)
def test_bytes_of_an_array(array, num_bytes):
    assert array.num_bytes == num_bytes


LOOPS = """
%condition.1 (p: (s32[], f32[8])) -> pred[] {
  %most = s32[]{:T(128)} constant(12)
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %one = s32[]{:T(128)} constant(1)
  %start = (s32[]{:T(128)}, f32[8]{0}) tuple(%one, %p)
  %peeled = (s32[], f32[8]{0}) while(%start), condition=%condition.1, body=%body.1
  %stated = (s32[], f32[8]{0}) while(%p), condition=%c, body=%body.2, backend_config={"known_trip_count":{"n":"5"}}
  %open = (s32[], f32[8]{0}) while(%p), condition=%condition.2, body=%body.3
}
"""


def test_turns_of_loops():
    assert hlo.loops(LOOPS) == [("peeled", "body.1", 11), ("stated", "body.2", 5), ("open", "body.3", None)]


def test_a_copy_to_the_chip_reads_memory_and_writes_none():
    text = """
ENTRY %main (p: f32[64,128]) -> f32[64,128] {
  %p = f32[64,128]{1,0:T(8,128)} parameter(0)
  %start = (f32[64,128]{1,0:T(8,128)S(1)}, f32[64,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p)
  %part = ((f32[64,128]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%p), slice={[0:8]}
  ROOT %done = f32[64,128]{1,0:T(8,128)S(1)} copy-done(%start)
}
"""
    _, copy, part, _ = hlo.parse(text).entry.instructions
    assert (copy.opcode, copy.bytes_read, copy.bytes_written) == ("copy", 4 * 64 * 128, 0)
    assert (part.opcode, part.bytes_read, part.bytes_written) == ("slice", 4 * 8 * 128, 0)


def test_an_instruction_may_have_line_breaks_in_its_metadata():
    text = """
ENTRY %main (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %k = f32[4]{0} custom-call(%p), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(step)/splash"}
}
"""
    (*_, call) = hlo.parse(text).entry.instructions
    assert call.attribute(r'op_name="([^"]*)"') == "jit(step)/splash"
