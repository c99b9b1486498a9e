"""What this machine has: packages, accelerators that the system shows, and the devices that JAX finds.

Nothing here imports JAX before it is asked for the devices, and nothing that a machine has or lacks raises.
"""

import contextlib
import importlib
import logging
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from typing import TYPE_CHECKING, NamedTuple

from sedd_jax.runtime import errors, hosts

if TYPE_CHECKING:
    import jax

DEV = pathlib.Path("/dev")
PACKAGES = ("sedd_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# The packages that let JAX use an NVIDIA GPU, and the oldest major version of the driver that each accepts
# (docs.jax.dev, "Installation").
CUDA_PLUGINS = {"jax-cuda13-plugin": 580, "jax-cuda12-plugin": 525}
GIB = 2**30


class Problem(NamedTuple):
    """What to change on a machine or in a config.

    Attributes:
        is_fatal: whether training would fail; otherwise it is merely slower than it could be.
        text: a sentence: what is wrong, and the command or the setting that mends it.
    """

    is_fatal: bool
    text: str


class Nvidia(NamedTuple):
    """What nvidia-smi says.

    Attributes:
        gpus: names of the GPUs.
        driver: version of the driver; "" if it is not known.
        failure: why nvidia-smi lists no GPU; "" if it does, or is not installed.
    """

    gpus: list[str]
    driver: str = ""
    failure: str = ""


class Devices(NamedTuple):
    """What JAX finds.

    Attributes:
        found: its devices; none if it does not start.
        heard: warnings that it logged on the way.
        failure: why it does not start; "" if it does.
    """

    found: "list[jax.Device]"
    heard: list[str]
    failure: str = ""


def check_imports() -> None:
    """Raises errors.UserError if a library cannot be imported, as with versions of jax and jaxlib that do not match."""
    for name in ("jax", "flax", "optax", "orbax.checkpoint"):
        try:
            importlib.import_module(name)
        except (ImportError, RuntimeError) as error:
            raise errors.UserError(f"{name} cannot be imported ({one_line(error)})", remedy=_reinstall()) from error


def _reinstall() -> str:
    """What installs those libraries again, in the versions that this package takes; itself it stays as it is."""
    try:
        needed = metadata.requires("sedd_jax") or []
    except metadata.PackageNotFoundError:
        needed = []
    wanted = [line for line in needed if re.match(r"(jax|flax|optax|orbax-checkpoint)\b(?!.*;)", line)]
    return " ".join(["pip install --force-reinstall", *(f"'{line}'" for line in wanted or ["jax"])])


def machine() -> dict[str, str]:
    """Operating system, Python, processor and memory."""
    return {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "python": f"{platform.python_version()}, {sys.executable}",
        "processor": f"{os.cpu_count()} cores of {hosts.processor()}",
        "memory": f"{hosts.memory_bytes() / GIB:.1f} GiB",
    }


def packages() -> dict[str, str]:
    """Versions of what a run needs, and of what lets JAX use accelerators where that is installed."""
    versions = {}
    for name in (*PACKAGES, *CUDA_PLUGINS, "libtpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def cuda_libraries() -> dict[str, str]:
    """Versions of CUDA and cuDNN that the plugin of JAX loads; empty without the plugin."""
    from jax._src import lib  # The versions have no public name.

    if lib.cuda_versions is None:
        return {}
    return {
        "CUDA": _library(lib.cuda_versions, "cuda_runtime_get_version", 1000, 10),
        "cuDNN": _library(lib.cuda_versions, "cudnn_get_version", 10_000, 100),
    }


def _library(versions: object, function: str, major: int, minor: int) -> str:
    try:
        number = getattr(versions, function)()
    except Exception as error:
        # The library is missing or broken, which the loader reports in many ways.
        return f"cannot be loaded: {one_line(error)}"
    return f"{number // major}.{number % major // minor}"


def nvidia() -> Nvidia:
    """Asks nvidia-smi for GPUs and their driver."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    if shutil.which("nvidia-smi") is None:
        return Nvidia([])
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return Nvidia([], failure=one_line(error))
    rows = [line.rsplit(", ", 1) for line in done.stdout.splitlines() if ", " in line]
    if done.returncode or not rows:
        said = " ".join((done.stdout + done.stderr).split())
        return Nvidia([], failure=said or f"exit status {done.returncode}")
    return Nvidia([name for name, _ in rows], driver=rows[0][1])


def tpu_files() -> list[str]:
    """Device files of TPUs."""
    return sorted(str(path) for pattern in ("accel[0-9]*", "vfio/[0-9]*") for path in DEV.glob(pattern))


def gpu_files() -> list[str]:
    """Device files of NVIDIA GPUs."""
    return sorted(str(path) for path in DEV.glob("nvidia[0-9]*"))


def devices() -> Devices:
    """Starts JAX, and listens to what it logs."""
    # A training on this machine may need the memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    with _heard("jax", "jax_plugins") as heard:
        try:
            return Devices(jax.devices(), heard)
        except Exception as error:
            # Drivers and plugins may raise anything.
            return Devices([], heard, one_line(error) or "it finds no device")


@contextlib.contextmanager
def _heard(*loggers: str) -> Iterator[list[str]]:
    """The warnings of these loggers, each on one line, which are not shown."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(" ".join(record.getMessage().split()))
    before = []
    for logger in map(logging.getLogger, loggers):
        before.append((logger, logger.level, logger.propagate))
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
        logger.propagate = False
    try:
        yield messages
    finally:
        for logger, level, propagate in before:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


def one_line(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says anything."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def problems(versions: dict[str, str], gpus: Nvidia, started: Devices) -> Iterator[Problem]:
    """What keeps JAX from starting, or from an accelerator that the system shows.

    Args:
        versions: what `packages` returned.
        gpus: what `nvidia` returned.
        started: what `devices` returned.
    """
    wanted, heard = os.environ.get("JAX_PLATFORMS", ""), started.heard
    seen = started.found[0].platform if started.found else ""
    unseen = list(_unseen(versions, gpus, started)) if seen in ("", "cpu") else []
    missed = [one for one in unseen if not wanted or one.platforms & set(wanted.split(","))]
    for one in missed:
        heard = []  # The reason holds them.
        yield Problem(True, f"JAX does not see {one.name}: {one.why}, or set JAX_PLATFORMS=cpu to do without it.")
    if not seen and not missed:
        remedy = "unset JAX_PLATFORMS" if wanted else _reinstall()
        yield Problem(True, f"JAX does not start with JAX_PLATFORMS={wanted!r} ({started.failure}): {remedy}.")
    for one in unseen:
        if seen and one not in missed:
            yield Problem(False, f"JAX_PLATFORMS={wanted} keeps JAX from {one.name}: unset it to train there.")
    if gpus.failure and not unseen and seen != "gpu":
        remedy = "if this machine has a GPU, install its driver again"
        yield Problem(False, f"nvidia-smi lists no GPU ({gpus.failure}): {remedy}.")
    for message in heard:
        yield Problem(False, f"JAX warns: {message}")


class _Unseen(NamedTuple):
    """An accelerator that the system shows and JAX does not, what JAX_PLATFORMS calls it, why, and what to do."""

    name: str
    platforms: set[str]
    why: str


def _unseen(versions: dict[str, str], gpus: Nvidia, started: Devices) -> Iterator[_Unseen]:
    if names := list(dict.fromkeys(gpus.gpus)) or gpu_files()[:1]:
        yield _Unseen(" and ".join(names), {"cuda", "gpu"}, _why_no_gpu(versions, gpus, started))
    if files := tpu_files():
        yield _Unseen(f"the TPU at {files[0]}", {"tpu"}, _why_no_tpu(versions, started))


def _why_no_gpu(versions: dict[str, str], gpus: Nvidia, started: Devices) -> str:
    """Why JAX does not see a GPU, and what to do."""
    plugins = [name for name in CUDA_PLUGINS if name in versions]
    if not plugins:
        return "no CUDA plugin is installed: pip install 'sedd_jax[gpu]'"
    plugin = plugins[0]
    cuda = plugin.removeprefix("jax-").removesuffix("-plugin")
    if _numbers(versions[plugin]) != _numbers(versions["jaxlib"]):
        return (
            f"{plugin} {versions[plugin]} does not match jaxlib {versions['jaxlib']}: "
            f"pip install 'jax[{cuda}]=={versions['jax']}'"
        )
    said = " ".join([*started.heard, started.failure]).strip() or "JAX does not say why"
    oldest = CUDA_PLUGINS[plugin]
    if gpus.driver and _numbers(gpus.driver)[:1] < (oldest,):
        return f"driver {gpus.driver} is too old for {plugin} ({said}): install driver {oldest} or newer"
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        hidden = os.environ["CUDA_VISIBLE_DEVICES"]
        return f"CUDA_VISIBLE_DEVICES={hidden!r} may hide it ({said}): unset CUDA_VISIBLE_DEVICES"
    if gpus.failure:
        return f"nvidia-smi fails ({gpus.failure}): install the driver again, {oldest} or newer"
    return f"{said}: pip install --force-reinstall 'jax[{cuda}]=={versions['jax']}'"


def _why_no_tpu(versions: dict[str, str], started: Devices) -> str:
    """Why JAX does not see a TPU, and what to do."""
    if "libtpu" not in versions:
        return "libtpu is not installed: pip install 'sedd_jax[tpu]'"
    said = " ".join([*started.heard, started.failure]).strip() or "JAX does not say why"
    return f"{said}: end other programs that use it, or pip install --force-reinstall 'jax[tpu]=={versions['jax']}'"


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version starts with."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def cache(directory: str | None) -> tuple[str, Problem | None]:
    """The compilation cache for people, and what is wrong with it.

    Args:
        directory: where JAX keeps compiled programs; None if it keeps none.
    """
    slower = "each start compiles again"
    if not directory:
        remedy = "set HOME, XDG_CACHE_HOME or JAX_COMPILATION_CACHE_DIR"
        return "not kept", Problem(False, f"JAX has no directory for compiled programs, so {slower}: {remedy}.")
    if "://" in directory:
        return f"kept in {directory}, which was not checked", None
    try:
        pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return f"kept in {directory}, writable", None
    except OSError as error:
        why = f"{directory} cannot be written ({error.strerror}), so {slower}"
        remedy = "make it writable, or set JAX_COMPILATION_CACHE_DIR to a directory that is"
        return f"not kept: {directory} is not writable", Problem(False, f"{why}: {remedy}.")
