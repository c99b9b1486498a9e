"""What runs here: the text of `sedd --version`, and what a report of a bug quotes."""

import contextlib
import platform
import shlex
from importlib import metadata

from sedd_jax.runtime import hosts


def table() -> str:
    """Versions of this program, of what it computes with, and the devices with their libraries."""
    from sedd_jax.performance import inventory

    inventory.check_imports()
    started = inventory.devices()
    kinds = [device.device_kind for device in started.found]
    devices = f"{len(kinds)} x {kinds[0]}" if kinds else f"no device, since JAX does not start: {started.failure}"
    libraries = [f"{name} {version}" for name, version in inventory.cuda_libraries().items()]
    others = [f"{name} {version}" for name, version in inventory.packages().items() if name != "sedd_jax"]
    return "\n".join(
        [", ".join(_own()), ", ".join(others), f"Python {platform.python_version()}", ", ".join([devices, *libraries])]
    )


def request_for_report(argv: list[str]) -> str:
    """The note under the traceback of a bug: what to report with it."""
    versions = [f"Python {platform.python_version()}"]
    for package in ("jax", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{package} {metadata.version(package)}")
    return (
        "This is a bug in sedd. Please report it with the traceback above, the command and the versions:\n"
        f"  {shlex.join(['sedd', *argv])}\n  {', '.join([*versions, *_own()])}"
    )


def _own() -> list[str]:
    """The version that is installed, and the commit where it is a checkout."""
    found = []
    with contextlib.suppress(metadata.PackageNotFoundError):
        found.append(f"sedd_jax {metadata.version('sedd_jax')}")
    if commit := hosts.revision():
        found.append(f"commit {commit}")
    return found or ["sedd_jax, not installed"]
