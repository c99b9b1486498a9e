"""The kernels of a compiled step: what each reads, writes and computes."""

import dataclasses
import math
import re

from sedd_jax.performance import hlo

# Instructions that run nothing; on a TPU, custom calls for the compiler itself.
_VIEWS = {"bitcast", "reshape", "get-tuple-element", "tuple", "parameter", "constant", "after-all", "partition-id"}
_VIEWS |= {"replica-id", "opt-barrier", "optimization-barrier", "domain", "get-dimension-size"}
_FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding"}
# `collectives` counts these.
_COMMUNICATION = re.compile(r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|send|recv)\b")
_MOVES = hlo.SLICES | {"dynamic-update-slice", "concatenate", "transpose", "pad", "copy", "reverse"}
_CONSTANTS = _VIEWS | {"iota", "broadcast"}
# Finding a place in a stack of arrays.
_INDICES = {"convert", "add", "subtract", "select", "compare", "clamp"}
# 32-bit operations an element; 1 where not listed. The three of threefry's rotation are one instruction of a GPU.
_OPERATIONS = {"exponential": 8, "log": 8, "tanh": 8, "logistic": 12, "sine": 12, "cosine": 12, "power": 20}
_OPERATIONS |= {"divide": 6, "rsqrt": 6, "shift-left": 1 / 3, "shift-right-logical": 1 / 3, "or": 1 / 3}
# Products of queries, keys and so on in a kernel of attention, by its target or name.
_ATTENTION = {
    "__cudnn$fmhaSoftmaxBackward": 5,
    "__cudnn$fmhaSoftmax": 2,
    "splash_mha_fwd": 2,
    "splash_mha_dq": 3,
    "splash_mha_dkv": 4,
}
# A loop over chunks of fewer tokens than this moves few of them in a sampling step: this many turns on average.
_SMALL_CHUNK, _SMALL_TURNS = 128, 0.4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel of a step. Bytes, FLOPs and operations are those of a call.

    Attributes:
        name: of the instruction.
        kind: products, attention, its gradient, fills with a constant, copies, transfers between a TPU's memory and
            chip, sums (of what is also written) or elementwise.
        scope: part of the step that it belongs to.
        where: name of the operation it comes from.
        arrays: what it writes.
        calls: how often a step runs it.
        bytes_read: from the device's memory.
        bytes_written: to it.
        flops: of the matrix units.
        operations: of 32 bits outside of them.
        is_triton: whether Triton compiled it.
    """

    name: str
    kind: str
    scope: str
    where: str
    arrays: tuple[hlo.Array, ...]
    calls: float
    bytes_read: float
    bytes_written: float
    flops: float
    operations: float
    is_triton: bool

    @property
    def num_bytes(self) -> float:
        return self.bytes_read + self.bytes_written


def kernels(text: str, head_share: float) -> tuple[list[Kernel], float]:
    """The kernels of a step, and how often a GPU waits for the host to decide on a loop.

    Args:
        text: the program, `Compiled.as_text()`.
        head_share: share of the positions that the head visits, which only the running program knows.
    """
    program = hlo.parse(text)
    found: list[Kernel] = []
    waits = 0.0

    def walk(computation: hlo.Computation, times: float) -> None:
        nonlocal waits
        scope = _scope("")
        for one in computation.instructions:
            if one.opcode == "while":
                turns = program.turns.get(one.name)
                if turns is None:
                    turns = _turns(one.called["body"], head_share)
                    waits += times * (turns + 1)
                walk(one.called["condition"], times * (turns + 1))
                walk(one.called["body"], times * turns)
            elif one.opcode in ("call", "conditional"):
                for called in one.called.values():
                    walk(called, times)
            elif _runs(one):
                found.append(_kernel(one, times, scope))
                scope = found[-1].scope

    walk(program.entry, 1.0)
    return found, waits


def _runs(one: hlo.Instruction) -> bool:
    if one.opcode in _VIEWS or one.opcode.endswith(("-done", "-update")):
        return False
    if any(_COMMUNICATION.match(part.opcode) for part in one.parts()):
        return False
    return one.attribute(r'custom_call_target="([^"]*)"') not in _FREE_CALLS


def _turns(body: hlo.Computation, head_share: float) -> float:
    """Turns of a loop whose length is found while it runs: over chunks of the positions that the head visits, or one.

    Such a loop slices the tokens of its chunk.
    """
    turns = 1.0
    for one in body.instructions:
        for part in one.parts():
            array = part.arrays[0] if part.arrays else None
            if part.opcode == "dynamic-slice" and array and array.dtype == "s32" and len(array.sizes) == 1:
                rows, chunk = part.operands[0].num_elements, array.num_elements
                if chunk > 1:
                    # The last chunk is half full on average.
                    turns = _SMALL_TURNS if chunk <= _SMALL_CHUNK else head_share * rows / chunk + 0.5
    return turns


def _kernel(one: hlo.Instruction, calls: float, scope_before: str) -> Kernel:
    parts = list(one.parts())
    target = one.attribute(r'custom_call_target="([^"]*)"')
    opcodes = {part.opcode for part in parts}
    read, written = one.bytes_read, one.bytes_written
    if target:
        # Without scratch memory.
        written = float(sum(array.num_bytes for array in one.arrays if array.dtype not in ("s8", "u8")))
    elif one.opcode == "copy" and one.operands[0].opcode in ("broadcast", "constant"):
        read, opcodes = 0.0, {"broadcast"}
    flops = sum(map(_flops, parts), start=0.0)
    attention = next((of for of in _ATTENTION if of in target or of in one.name), "")
    if attention:
        flops = _attention_flops(one, attention)
    products = [part for part in parts if part.opcode in ("dot", "convolution")]
    where = next((name for name in map(_op_name, (one, *products, *parts)) if name), "")
    return Kernel(
        name=one.name,
        kind=_kind(opcodes, attention, flops, read, written),
        # What the compiler adds has no name. It belongs to the kernels around it.
        scope=_scope(where) if where else scope_before,
        where=where,
        arrays=one.arrays,
        calls=calls,
        bytes_read=read,
        bytes_written=written,
        flops=flops,
        operations=0.0 if target else sum(map(_operations, parts), start=0.0),
        is_triton="kind=kCustom" in one.attributes and "__triton" in one.attributes,
    )


def _kind(opcodes: set[str], attention: str, flops: float, read: float, written: float) -> str:
    if attention:
        return "attention, gradient" if attention not in ("__cudnn$fmhaSoftmax", "splash_mha_fwd") else "attention"
    if flops:
        return "products"
    if opcodes <= _CONSTANTS:
        return "fills"
    if opcodes <= {"copy", "slice"} and not (read and written):
        return "transfers"
    moves = opcodes & (_MOVES | hlo.IN_PLACE)
    if opcodes <= _CONSTANTS | _MOVES | {"convert"} or (moves and opcodes <= _CONSTANTS | _MOVES | _INDICES):
        return "copies"
    return "sums" if "reduce" in opcodes and written > read / 8 else "elementwise"


def _op_name(one: hlo.Instruction) -> str:
    return one.attribute(r'op_name="([^"]*)"')


def _scope(where: str) -> str:
    """Part of the step that an operation's name says: layers (and in which direction), head, or the rest."""
    if "ScoreNetwork" in where:
        direction = "backward" if "transpose(jvp" in where else "forward"
        return f"layers, {'recomputed' if 'rematted_computation' in where else direction}"
    if "jvp(" in where or "while/body/while/body" in where or "_draw_from_sums" in where:
        return "head"
    return "optimizer, noise"


def _operations(one: hlo.Instruction) -> float:
    if one.opcode in _CONSTANTS | _MOVES | {"dot", "convolution"}:
        return 0.0
    size = sum(operand.num_elements for operand in one.operands) if one.opcode == "reduce" else one.num_elements
    is_64_bits = bool(one.arrays) and one.arrays[0].dtype in ("u64", "s64")
    return float(size * _OPERATIONS.get(one.opcode, 1) * (2 if is_64_bits else 1))


def _attention_flops(one: hlo.Instruction, attention: str) -> float:
    """All pairs of positions count, those that a mask leaves out too."""
    # [B, L, H, K] for cuDNN; [B, H, L, K] for splash, after small tables, and without B if that is 1.
    array = next(x for operand in one.operands for x in operand.arrays if x.dtype == "bf16" and len(x.sizes) > 2)
    length = array.sizes[1 if "cudnn" in attention else -2]
    return 2.0 * _ATTENTION[attention] * array.num_elements * length


def _flops(one: hlo.Instruction) -> float:
    """Operations of a product; 0 for all else."""
    if one.opcode == "convolution":
        return _convolution_flops(one)
    if one.opcode == "dot":
        contracted = one.attribute(r"lhs_contracting_dims=\{([^}]*)\}")
    elif "__cublas" in one.attributes:
        contracted = one.attribute(r'lhs_contracting_dimensions":\[([^\]]*)\]')
    else:
        return 0.0
    sizes = one.operands[0].arrays[0].sizes
    return 2.0 * one.arrays[0].num_elements * math.prod(sizes[int(axis)] for axis in re.findall(r"\d+", contracted))


def _convolution_flops(one: hlo.Instruction) -> float:
    """A TPU's products are convolutions, whose window may pad or dilate so that most of its places are empty."""
    left, kernel, out = one.attribute(r"dim_labels=([\w>-]+)").replace("->", "_").split("_")
    lhs, rhs, result = one.operands[0].arrays[0].sizes, one.operands[1].arrays[0].sizes, one.arrays[0].sizes
    total = 2.0 * result[out.index("b")] * result[out.index("f")] * rhs[kernel.index("i")]
    windows = {
        key: values.split("x") for key, values in re.findall(r"(\w+)=([\d_x-]+)", one.attribute(r"window=\{([^}]*)\}"))
    }
    for axis in range(len(result) - 2):
        of = lambda key, default, axis=axis: windows[key][axis] if key in windows else default
        low = int(of("pad", "0_0").split("_")[0])
        stride, spread, apart = (int(of(key, "1")) for key in ("stride", "lhs_dilate", "rhs_dilate"))
        size = (lhs[left.index(str(axis))] - 1) * spread + 1
        places = (
            i * stride - low + k * apart
            for i in range(result[out.index(str(axis))])
            for k in range(rhs[kernel.index(str(axis))])
        )
        total *= sum(0 <= place < size and place % spread == 0 for place in places)
    return total
