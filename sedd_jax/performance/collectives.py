"""Collective operations of a compiled program, read from its text (HLO)."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
_INSTRUCTION = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
# Between slices, hosts send and receive. The transfer type names the kind of collective.
_BETWEEN_SLICES = re.compile(r'= \((.*?), u32\[\].*? send\(.*_xla_megascale_transfer_type="(\w+)"')
# A reduce-scatter may be compiled to a fusion of an all-reduce with a slice.
_SCATTER = re.compile(r"= (.*?) fusion\(.*calls=%?(all-reduce-scatter[\w.-]*)")
_ARRAY = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective operation of a program.

    Attributes:
        kind: one of `KINDS`.
        shapes: dtype and dimensions of its results on one device; between slices, those of the operands.
        group_size: devices in a group; between slices, the number of slices.
        times: how often a step runs it, the product of the trip counts of the loops around it.
        between_slices: whether it uses the network between slices, where each device exchanges with its peers.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    group_size: int
    times: int
    between_slices: bool = False

    @property
    def bytes_sent(self) -> float:
        """Bytes that each device sends in a step, with the algorithms that send the least (rings)."""
        size = sum(_BYTES.get(dtype, 4) * math.prod(shape) for dtype, shape in self.shapes)
        others = self.group_size - 1
        share = {
            "all-gather": others if self.between_slices else others / self.group_size,
            "all-to-all": others / self.group_size,
            "all-reduce": 2 * others / self.group_size,
            "reduce-scatter": others / self.group_size if self.between_slices else others,
            "collective-permute": 1,
        }[self.kind]
        return float(size * share * self.times)


def collectives(hlo: str, num_slices: int = 1) -> list[Collective]:
    """The collectives of a compiled program.

    The compiler may split an operation into overlapping pieces with the same channel. They count once. Operations of
    another kind or shape may share a channel and count separately.

    Args:
        hlo: text of the program, `Compiled.as_text()`.
        num_slices: TPU slices that it runs on.
    """
    times = _times_run(hlo)
    scatters = {name: line for name, line in _lines(hlo) if name.startswith("all-reduce-scatter") and "channel" in line}
    found: dict[Any, Collective] = {}
    for computation, line in _lines(hlo):
        runs = times.get(computation, 1)
        if computation in scatters:
            continue
        if (match := _SCATTER.search(line)) and match.group(2) in scatters:
            size = _group_size(scatters[match.group(2)])
            found[line] = Collective("reduce-scatter", _shapes(match.group(1)), size, runs)
        elif match := _BETWEEN_SLICES.search(line):
            kind = match.group(2).lower().replace("_", "-")
            found[line] = Collective(kind, _shapes(match.group(1)), num_slices, runs, between_slices=True)
        elif match := _INSTRUCTION.search(line):
            shapes = _shapes(match.group(1))
            if match.group(3) and match.group(2) != "all-reduce":
                # An asynchronous start returns the operand, the result and counters.
                shapes = shapes[1:2]
            channel = re.search(r"channel_id=(\d+)", line)
            key = (match.group(2), shapes, channel.group(1), runs) if channel else line
            found[key] = Collective(match.group(2), shapes, _group_size(line), runs)
    return list(found.values())


def _shapes(text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    found = _ARRAY.findall(text)
    return tuple((dtype, tuple(int(size) for size in sizes.split(",") if size)) for dtype, sizes in found)


def _lines(hlo: str) -> Iterator[tuple[str, str]]:
    """Every line with the name of its computation."""
    computation = ""
    for line in hlo.splitlines():
        if line.endswith("{") and (header := re.match(r"(?:ENTRY )?%?([\w.-]+) ", line)):
            computation = header.group(1)
        else:
            yield computation, line


def _times_run(hlo: str) -> dict[str, int]:
    """How often each computation runs, from the loops that call it. A loop without a known trip count counts once."""
    callers: dict[str, list[tuple[str, int]]] = {}
    bounds: dict[str, int] = {}
    loops: list[tuple[str, str, str, str]] = []
    # Maps an instruction to its first operand, to find where a loop starts: a peeled loop does not start at 0.
    sources: dict[str, str] = {}
    for computation, line in _lines(hlo):
        constant = re.search(r"= s32\[\]\S* constant\((\d+)\)", line)
        if constant:
            bounds[computation] = max(bounds.get(computation, 1), int(constant.group(1)))
        if source := re.search(r"%([\w.-]+) = .*? (?:constant|copy|tuple)\(%?([\w.-]+)", line):
            sources[source.group(1)] = source.group(2)
        loop = re.search(r" while\(%?([\w.-]+)\), condition=%?([\w.-]+), body=%?([\w.-]+)", line)
        if loop:
            loops.append((computation, loop.group(1), loop.group(2), loop.group(3)))
        else:
            for called in re.findall(r"(?:calls|to_apply|called_computations)=\{?%?([\w.-]+)", line):
                callers.setdefault(called, []).append((computation, 1))
    for computation, start, condition, body in loops:
        while start in sources:
            start = sources[start]
        first = int(start) if start.isdecimal() else 0
        callers.setdefault(body, []).append((computation, max(1, bounds.get(condition, 1) - first)))

    def count(computation: str) -> int:
        return max((count(caller) * bound for caller, bound in callers.get(computation, [])), default=1)

    return {computation: count(computation) for computation in callers}


def _group_size(line: str) -> int:
    """Devices in a group, from any of the notations of HLO."""
    if named := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named.group(2)))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(counted.group(1))
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed.group(1).split(","))
    return 2  # A permutation lists pairs.
