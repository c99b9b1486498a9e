"""The text of a program that XLA compiled (HLO), as instructions with their arrays."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# Bytes of an element; 4 where the dtype is not listed.
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8, "token": 0}
SLICES, IN_PLACE = {"slice", "dynamic-slice", "gather"}, {"dynamic-update-slice", "scatter"}
# These may read an element of their operands more than once, or out of order.
_WHOLE = SLICES | IN_PLACE | {"tuple", "transpose", "reduce", "dot", "convolution", "custom-call", "fusion"}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_CALLS = re.compile(r"\b(calls|body|condition|to_apply|\w+_computations?)=(?:%?([\w.-]+)|\{([^}]*)\})")


class Array(NamedTuple):
    """An array as a program keeps it.

    Attributes:
        dtype: HLO's name, such as bf16.
        sizes: its dimensions.
        layout: order of the axes, tiles and memory, as HLO writes them between braces.
    """

    dtype: str
    sizes: tuple[int, ...]
    layout: str = ""

    @property
    def num_elements(self) -> int:
        return math.prod(self.sizes)

    @property
    def num_bytes(self) -> int:
        """Bytes in the device's memory, with the padding of a TPU's tiles. An array that stays on the chip has none."""
        if "S(1)" in self.layout:
            return 0
        sizes, (order, _, tiles) = list(self.sizes), self.layout.partition(":T(")
        minor_to_major = [int(axis) for axis in order.split(",") if axis.isdecimal()]
        tile = [int(size) for size in tiles.partition(")")[0].split(",") if size.isdecimal()]
        for axis, size in zip(minor_to_major, reversed(tile), strict=False):
            sizes[axis] = math.ceil(sizes[axis] / size) * size
        return math.prod(sizes) * BYTES.get(self.dtype, 1 if self.dtype.startswith("f8") else 4)


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """A line of HLO: `name = arrays opcode(operands), attributes`.

    Attributes:
        arrays: its result; several if that is a tuple.
        called: the computations that its attributes name, such as "calls" of a fusion and "body" of a loop.
    """

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple["Instruction", ...] = dataclasses.field(repr=False)
    attributes: str
    called: dict[str, "Computation"] = dataclasses.field(repr=False)

    @property
    def num_elements(self) -> int:
        return sum(array.num_elements for array in self.arrays)

    @property
    def num_bytes(self) -> int:
        return sum(array.num_bytes for array in self.arrays)

    @property
    def bytes_read(self) -> float:
        """Bytes of the operands that are read: of a slice a part, of what is updated in place nothing."""
        return sum((self.share_read(place) * one.num_bytes for place, one in enumerate(self.operands)), start=0.0)

    @property
    def bytes_written(self) -> float:
        """Bytes of the results that are written: of what is updated in place the update."""
        if "calls" in self.called:
            return self.called["calls"].root.bytes_written
        if self.opcode == "tuple":
            return sum((one.bytes_written for one in self.operands), start=0.0)
        if self.opcode == "bitcast" and self.operands[0].opcode in IN_PLACE | {"bitcast"}:
            return self.operands[0].bytes_written
        updates = {"dynamic-update-slice": 1, "scatter": -1}
        return float((self.operands[updates[self.opcode]] if self.opcode in updates else self).num_bytes)

    def share_read(self, place: int) -> float:
        """How much of an operand is read."""
        if "calls" in self.called:
            return self.called["calls"].parameter_shares[place]
        if self.opcode in SLICES and place == 0:
            return self.num_elements / max(self.operands[0].num_elements, 1)
        return float(not (self.opcode in IN_PLACE and place == 0))

    def attribute(self, pattern: str) -> str:
        """The group of a pattern in the attributes; "" if it is not there."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else ""

    def parts(self) -> Iterator["Instruction"]:
        """The instructions that a kernel runs: itself, or those of a fusion and of the fusions in it."""
        if "calls" in self.called:
            for one in self.called["calls"].instructions:
                yield from one.parts()
        else:
            yield self


class Computation:
    """Instructions, each after its operands, and the one whose value is the result."""

    def __init__(self) -> None:
        self.instructions: list[Instruction] = []
        self.root: Instruction

    @functools.cached_property
    def parameter_shares(self) -> list[float]:
        """How much of each parameter is read, at most all of it once."""
        shares = dict.fromkeys(self.instructions, 0.0)
        shares[self.root] = 1.0
        for user in reversed(self.instructions):
            shares[user] = min(shares[user], 1.0)
            for place, one in enumerate(user.operands):
                is_pointwise = user.opcode not in _WHOLE and user.num_elements == one.num_elements
                is_part = is_pointwise or (user.opcode in SLICES and place == 0)
                shares[one] += user.share_read(place) * (shares[user] if is_part else 1.0)
        parameters = [one for one in self.instructions if one.opcode == "parameter"]
        return [shares[one] for one in sorted(parameters, key=lambda one: int(one.attributes))]


class Program(NamedTuple):
    """A compiled program.

    Attributes:
        entry: what it starts with.
        turns: turns of the loops whose length the compiler knows, by their instruction's name.
    """

    entry: Computation
    turns: dict[str, int]


def parse(text: str) -> Program:
    """The program in a text of HLO, in which computations come before those that call them."""
    computations: dict[str, Computation] = {}
    entry, current, values = Computation(), Computation(), {}
    # The metadata of a hand-written kernel has line breaks.
    for line in re.sub(r'\n(?="|}})', " ", text).splitlines():
        if line.endswith("{") and not line.startswith(("HloModule", " ")):
            name = line.removeprefix("ENTRY ").lstrip("%").split(" ", 1)[0]
            current, values = Computation(), {}
            computations[name] = current
            entry = current if line.startswith("ENTRY ") else entry
        elif " = " in line and line.startswith(" "):
            left, right = re.sub(r"/\*.*?\*/", "", line).strip().split(" = ", 1)
            one = _instruction(left.removeprefix("ROOT ").lstrip("%"), right, values, computations)
            values[one.name] = one
            current.instructions.append(one)
            if left.startswith("ROOT "):
                current.root = one
    return Program(entry, {loop: count for loop, _, count in loops(text) if count is not None})


def loops(text: str) -> list[tuple[str, str, int | None]]:
    """Every loop's name, its body, and its turns if the compiler knows them."""
    bounds: dict[str, int] = {}
    found: list[tuple[str, ...]] = []
    # Maps an instruction to its first operand, to find where a loop starts: a peeled loop does not start at 0.
    sources: dict[str, str] = {}
    for computation, line in lines(text):
        if constant := re.search(r"= s32\[\]\S* constant\((\d+)\)", line):
            bounds[computation] = max(bounds.get(computation, 1), int(constant.group(1)))
        if source := re.search(r"%([\w.-]+) = .*? (?:constant|copy|tuple)\(%?([\w.-]+)", line):
            sources[source.group(1)] = source.group(2)
        if loop := re.search(r"%([\w.-]+) = .* while\(%?([\w.-]+)\), condition=%?([\w.-]+), body=%?([\w.-]+)", line):
            stated = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            found.append((*loop.groups(), stated.group(1) if stated else ""))
    turns = []
    for name, start, condition, body, stated in found:
        while start in sources:
            start = sources[start]
        first = int(start) if start.isdecimal() else 0
        known = int(stated) if stated else max(1, bounds[condition] - first) if condition in bounds else None
        turns.append((name, body, known))
    return turns


def lines(text: str) -> Iterator[tuple[str, str]]:
    """Every line with the name of its computation."""
    computation = ""
    for line in text.splitlines():
        if line.endswith("{") and (header := re.match(r"(?:ENTRY )?%?([\w.-]+) ", line)):
            computation = header.group(1)
        else:
            yield computation, line


def _instruction(
    name: str, right: str, values: dict[str, Instruction], computations: dict[str, Computation]
) -> Instruction:
    shape, rest = _parenthesis(right) if right.startswith("(") else right.split(" ", 1)
    opcode, rest = rest.strip().split("(", 1)
    inside, attributes = _parenthesis("(" + rest)
    arrays = tuple(
        Array(dtype, tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size), layout)
        for dtype, sizes, layout in _ARRAY.findall(shape)
    )
    if opcode.endswith("-start") and len(arrays) > 1:
        # The start of a copy returns the result, the operand and a context; others the operands, the result, a context.
        opcode, arrays = opcode.removesuffix("-start"), arrays[:1] if opcode == "copy-start" else arrays[-2:-1]
    called = {}
    for role, single, several in _CALLS.findall(attributes):
        for place, one in enumerate(re.findall(r"[\w.-]+", single or several)):
            if one in computations:
                called[f"{role}.{place}" if several else role] = computations[one]
    is_parameter = opcode == "parameter"
    operands = () if is_parameter else tuple(values[one] for one in re.findall(r"%([\w.-]+)", inside))
    return Instruction(name, arrays, opcode, operands, inside[1:-1] if is_parameter else attributes, called)


def _parenthesis(text: str) -> tuple[str, str]:
    """A text that starts with a parenthesis, parted where that closes."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: i + 1], text[i + 1 :]
    raise ValueError(f"no closing parenthesis in {text[:80]}")
