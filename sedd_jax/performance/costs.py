"""Where the time of a compiled step goes: seconds of its kernels, by kind, by part of the step, and one by one."""

import re
from collections.abc import Callable
from typing import Any

from sedd_jax.performance import gpus, kernels, prices
from sedd_jax.runtime import accelerators

NUM_DEAREST = 12


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
    seconds_of = (lambda one: prices.on_gpu(one, gpu)) if gpu else (lambda one: prices.on_tpu(one, accelerator))
    priced = [(one, one.calls * seconds_of(one)) for one in found]
    if gpu:
        seconds = sum(of for _, of in priced) + prices.between_kernels(sum(one.calls for one in found), waits)
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
