"""Slices of TPUs to compile for that are not here."""

import math
from typing import Any

import jax
from jax.experimental import topologies

from sedd_jax.runtime import errors, hosts

# Slices that libtpu knows and Google offers: number of axes, most chips, and shapes for messages.
_FLAT = "1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"
_DEEP = "2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8 and so on"
SLICES = {
    "v4": (3, 4096, _DEEP),
    "v5e": (2, 256, _FLAT),
    "v5p": (3, 6144, _DEEP),
    "v6e": (2, 256, _FLAT),
    "tpu7x": (3, 9216, _DEEP),
}


def check_topology(topology: str) -> None:
    """Raises errors.UserError, which lists the accepted shapes, if the chips of a TPU are no slice.

    Messages of libtpu do not list them.
    """
    refuse = lambda problem, remedy: errors.UserError(problem, field="topology", value=topology, remedy=remedy)
    generation, _, shape = topology.partition(":")
    num_axes, most, examples = SLICES[generation]
    sizes = [int(size) if size.isdecimal() else 0 for size in shape.split("x")]
    is_one_chip = num_axes == 2 and sizes == [1, 1]
    is_even = not any(size % 2 for size in sizes[:2])
    if len(sizes) != num_axes or not 0 < math.prod(sizes) <= most or not (is_even or is_one_chip):
        raise refuse(
            f"is no slice of a {generation}, which has chips along {num_axes} axes, even along the first two, {most} "
            "in all at most",
            f"{generation}:{examples}",
        )


def make_devices(topology: str, num_slices: int = 1) -> list[jax.Device]:
    """Devices of a TPU slice to compile for. They need not exist here.

    Raises:
        errors.UserError: if libtpu is not installed or rejects the topology.
    """
    hosts.compile_for_others()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # JAX cannot load programs for absent devices from it.
    options: dict[str, Any] = {}
    if topology.startswith("v4:"):
        # Both cores of a chip form one device, as they do on real chips. On v5p this is the default.
        options["chip_config_name"] = "megacore"
    if topology.endswith(":1x1"):
        options["chips_per_host_bounds"] = (1, 1, 1)  # The default is four chips per host.
    try:
        # libtpu warns of everything that only a TPU host has.
        with hosts.silenced():
            slices = topologies.get_topology_desc(topology, "tpu", num_slices=num_slices, **options)
    except RuntimeError as error:  # JAX's JaxRuntimeError is one.
        if any(sign in str(error) for sign in ("libtpu", "No jax plugin", "TPU support not installed")):
            raise errors.UserError("plan needs libtpu", remedy="pip install 'sedd_jax[tpu-plan]'") from error
        if not isinstance(error, jax.errors.JaxRuntimeError):
            raise
        why = str(error).partition(": ")[2] or str(error)
        raise errors.UserError(f"is refused by libtpu ({why})", field="topology", value=topology) from error
    return list(slices.devices)
