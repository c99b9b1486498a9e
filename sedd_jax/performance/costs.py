"""Where the time of a compiled step goes: seconds of its kernels, by kind, by part of the step, and one by one.

The price of a kernel on a GPU is by rates that were measured on an H200, on a TPU at its nominal rates.
"""

import re
from collections.abc import Callable
from typing import Any

from sedd_jax.performance import gpus, kernels
from sedd_jax.runtime import accelerators

NUM_DEAREST = 12
# Shares of the nominal rate that kernels reach on an H200, fitted to the profile of a training step of 2026-11-27
# (4.8 TB/s, 989 TFLOP/s dense in bfloat16). Of memory's: plain streams, bfloat16 arrays, Triton's kernels over rows,
# sums over what is also written, and zero-fills in bfloat16.
_STREAM, _BFLOAT16, _TRITON, _SUMS, _FILL = 3.8 / 4.8, 2.8 / 4.8, 2.6 / 4.8, 2.6 / 4.8, 1.7 / 4.8
# Of the matrix units'.
_MATRIX = {"products": 790 / 989.5, "attention": 430 / 989.5, "attention, gradient": 365 / 989.5}
# Of 32-bit operations at the boost clock.
_OPERATIONS = 1.755 / 1.98
# A kernel that moves less than twice the L2 cache finds part of it there, and streams.
_CACHED = 2.1
# Seconds: of a kernel's start, between kernels, and of a question to the host.
_START, _GAP, _HOST_WAIT = 1.2e-6, 0.8e-6, 10e-6
# Steps of configs/owt_small.py that an H200 ran on that day against these prices.
_COMPARED = (
    "where five steps took 0.5 to 10 % longer than estimated: training, batch 32, 67.5 ms against 65.9; "
    "sampling, batch 16, 10.9 against 9.9"
)


def costs(text: str, accelerator: accelerators.Accelerator, gpu: gpus.Gpu | None, head_share: float) -> dict[str, Any]:
    """Seconds, calls, bytes and FLOPs of a step's kernels on one device.

    Args:
        text: the program, `Compiled.as_text()`.
        accelerator: the device.
        gpu: the same, if it is a GPU.
        head_share: share of the positions that the head visits.

    Returns:
        "kinds" and "scopes", each a sum by name; "dearest" kernels, alike ones as one; "seconds": of the whole step
        without collectives.
    """
    found, waits = kernels.kernels(text, head_share)
    seconds_of = (lambda one: on_gpu(one, gpu)) if gpu else (lambda one: on_tpu(one, accelerator))
    priced = [(one, one.calls * seconds_of(one)) for one in found]
    if gpu:
        seconds = sum(of for _, of in priced) + between_kernels(sum(one.calls for one in found), waits)
    else:
        # Transfers between memory and chip run beside other kernels, but all share the memory's rate.
        alone = sum(of for one, of in priced if one.kind != "transfers")
        seconds = max(alone, sum(one.calls * one.num_bytes for one in found) / accelerator.hbm_bandwidth)
    alike = _sums(priced, _alike)
    first = {_alike(one): one for one, _ in reversed(priced)}
    dearest = [
        total
        | {
            "name": first[key].name,
            "kind": first[key].kind,
            "scope": first[key].scope,
            "where": first[key].where,
            "arrays": [f"{array.dtype}{list(array.sizes)}".replace(" ", "") for array in first[key].arrays],
        }
        for key, total in list(alike.items())[:NUM_DEAREST]
    ]
    return {
        "seconds": seconds,
        "kinds": _sums(priced, lambda one: one.kind),
        "scopes": _sums(priced, lambda one: one.scope),
        "dearest": dearest,
    }


def _alike(one: kernels.Kernel) -> tuple[Any, ...]:
    """Equal for kernels that do the same: in an unrolled loop each layer has its own."""
    return re.sub(r"[.\d]+$", "", one.name), one.scope, one.arrays, one.num_bytes


def _sums(
    priced: list[tuple[kernels.Kernel, float]], key_of: Callable[[kernels.Kernel], Any]
) -> dict[Any, dict[str, float]]:
    """Seconds, calls, bytes and FLOPs of all kernels with the same key, the dearest first."""
    sums: dict[Any, dict[str, float]] = {}
    for one, seconds in priced:
        total = sums.setdefault(
            key_of(one), dict.fromkeys(("seconds", "calls", "bytes_read", "bytes_written", "flops"), 0.0)
        )
        total["seconds"] += seconds
        total["calls"] += one.calls
        for name in ("bytes_read", "bytes_written", "flops"):
            total[name] += one.calls * getattr(one, name)
    return dict(sorted(sums.items(), key=lambda item: -item[1]["seconds"]))


def on_gpu(one: kernels.Kernel, gpu: gpus.Gpu) -> float:
    """Seconds of a call: what memory, the matrix units or all other units need, whichever is slowest."""
    peak = gpu.accelerator
    is_bfloat16 = bool(one.arrays) and one.arrays[0].dtype == "bf16"
    share = _STREAM
    if one.is_triton:
        share = _TRITON
    elif one.kind == "fills" and is_bfloat16:
        share = _FILL
    elif one.kind == "sums":
        share = _SUMS
    elif is_bfloat16 and one.kind not in ("copies", "fills") and one.num_bytes > _CACHED * gpu.l2_bytes:
        share = _BFLOAT16
    return _START + max(
        one.num_bytes / (share * peak.hbm_bandwidth),
        one.flops / (_MATRIX.get(one.kind, 1.0) * peak.peak_flops),
        one.operations / (_OPERATIONS * gpu.operations_per_second),
    )


def between_kernels(num_kernels: float, host_waits: float) -> float:
    """Seconds of a step in which a GPU runs no kernel."""
    return _GAP * num_kernels + _HOST_WAIT * host_waits


def on_tpu(one: kernels.Kernel, accelerator: accelerators.Accelerator) -> float:
    """Seconds of a call if memory or the matrix units run at their nominal rate, whichever is slower."""
    return max(one.num_bytes / accelerator.hbm_bandwidth, one.flops / accelerator.peak_flops)


def basis(accelerator: accelerators.Accelerator, is_gpu: bool) -> str:
    """What an estimate for this device rests on, and how far it is off where that was measured."""
    if not is_gpu:
        return (
            "every kernel at the nominal rate of memory or matrix units: nothing was measured on a TPU, which is slower"
        )
    if accelerator != accelerators.H200_SXM:
        return "rates of an H200, scaled by peak and bandwidth: not measured on this GPU"
    return f"rates fitted on an H200, {_COMPARED}"
