"""Collective operations of a compiled program, read from its text (HLO)."""

import math
import re
from typing import Any, NamedTuple

import numpy as np

from sedd_jax.performance import hlo

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
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
        num_hosts: hosts whose GPUs are in a group.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    group_size: int
    times: int
    between_slices: bool = False
    num_hosts: int = 1

    @property
    def bytes_sent(self) -> float:
        """Bytes that each device sends in a step, with the algorithms that send the least (rings)."""
        size = sum(hlo.BYTES.get(dtype, 4) * math.prod(shape) for dtype, shape in self.shapes)
        others = self.group_size - 1
        share = {
            "all-gather": others if self.between_slices else others / self.group_size,
            "all-to-all": others / self.group_size,
            "all-reduce": 2 * others / self.group_size,
            "reduce-scatter": others / self.group_size if self.between_slices else others,
            "collective-permute": 1,
        }[self.kind]
        return float(size * share * self.times)

    @property
    def bytes_between_hosts(self) -> float:
        """Of these bytes, those that leave a host of GPUs: rings go through all GPUs of a host before they leave it."""
        return self.bytes_sent * self.num_hosts / self.group_size if self.num_hosts > 1 else 0.0

    @property
    def bytes_within_hosts(self) -> float:
        """Of these bytes, those that GPUs of a host send to each other."""
        return self.bytes_sent if self.group_size > self.num_hosts else 0.0


def collectives(text: str, num_slices: int = 1, host_devices: int = 0) -> list[Collective]:
    """The collectives of a compiled program.

    The compiler may split an operation into overlapping pieces with the same channel. They count once. Operations of
    another kind or shape may share a channel and count separately.

    Args:
        text: the program, `Compiled.as_text()`.
        num_slices: TPU slices that it runs on.
        host_devices: GPUs of a host; 0 for TPUs.
    """
    times = _times_run(text)
    scatters = {
        name: line for name, line in hlo.lines(text) if name.startswith("all-reduce-scatter") and "channel" in line
    }
    found: dict[Any, Collective] = {}
    for computation, line in hlo.lines(text):
        runs = times.get(computation, 1)
        if computation in scatters:
            continue
        if (match := _SCATTER.search(line)) and match.group(2) in scatters:
            size = len(_group(scatters[match.group(2)]))
            found[line] = Collective("reduce-scatter", _shapes(match.group(1)), size, runs)
        elif match := _BETWEEN_SLICES.search(line):
            kind = match.group(2).lower().replace("_", "-")
            found[line] = Collective(kind, _shapes(match.group(1)), num_slices, runs, between_slices=True)
        elif match := _INSTRUCTION.search(line):
            shapes = _shapes(match.group(1))
            if match.group(3) and match.group(2) != "all-reduce":
                # An asynchronous start returns operands, as many results, and counters.
                shapes = tuple(shape for shape in shapes if shape != ("u32", ()))
                shapes = shapes[len(shapes) // 2 :]
            group = _group(line)
            num_hosts = len({device // host_devices for device in group}) if host_devices else 1
            channel = re.search(r"channel_id=(\d+)", line)
            key = (match.group(2), shapes, channel.group(1), runs) if channel else line
            found[key] = Collective(match.group(2), shapes, len(group), runs, num_hosts=num_hosts)
    return list(found.values())


def _shapes(text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    found = _ARRAY.findall(text)
    return tuple((dtype, tuple(int(size) for size in sizes.split(",") if size)) for dtype, sizes in found)


def _times_run(text: str) -> dict[str, int]:
    """How often each computation runs, from the loops that call it. A loop without a known trip count counts once."""
    callers: dict[str, list[tuple[str, int]]] = {}
    turns = {body: known or 1 for _, body, known in hlo.loops(text)}
    for computation, line in hlo.lines(text):
        for called in re.findall(r"(?:calls|to_apply|called_computations|body)=\{?%?([\w.-]+)", line):
            callers.setdefault(called, []).append((computation, turns.get(called, 1)))

    def count(computation: str) -> int:
        return max((count(caller) * bound for caller, bound in callers.get(computation, [])), default=1)

    return {computation: count(computation) for computation in callers}


def _group(line: str) -> list[int]:
    """The devices of the first group, from any of the notations of HLO."""
    if named := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", line):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named.group(1))}
        among = re.findall(r"'(\w+)'", named.group(3))
        devices = _devices(named.group(2) or f"[{math.prod(sizes.values())}]").reshape(tuple(sizes.values()))
        return devices[tuple(slice(None) if axis in among else 0 for axis in sizes)].ravel().tolist()
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line):
        return _devices(counted.group(2))[: int(counted.group(1))].tolist()
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return [int(device) for device in listed.group(1).split(",")]
    # A permutation lists pairs.
    return [int(device) for device in re.findall(r"\d+", line.partition("source_target_pairs={{")[2])[:2]] or [0, 1]


def _devices(order: str) -> np.ndarray:
    """Devices in the order that HLO writes as [2,8]T(1,0): counted by these sizes, and transposed."""
    sizes, _, axes = order.partition("T")
    counted = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
    return (counted.transpose(_numbers(axes)) if axes else counted).ravel()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
