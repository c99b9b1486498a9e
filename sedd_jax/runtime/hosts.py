"""The host machine: facts about it, and settings to make before JAX starts."""

import contextlib
import hashlib
import os
import pathlib
import platform
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator

from sedd_jax.runtime import errors, interrupts

CPUINFO = pathlib.Path("/proc/cpuinfo")
ACCELERATOR_FLAGS = pathlib.Path(__file__).with_name("accelerator_flags.txt")
HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
CONTAINER_MEMORY = pathlib.Path("/sys/fs/cgroup/memory.max")


def processor() -> str:
    """The name of the processor model."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def memory_bytes() -> int:
    """Memory of this machine, or what its container or this process (`ulimit -v`) may use of it if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    total = total if limit == resource.RLIM_INFINITY else min(total, limit)
    with contextlib.suppress(OSError, ValueError):  # No container, or one without a limit, whose file says "max".
        return min(total, int(CONTAINER_MEMORY.read_text()))
    return total


def peak_memory_bytes() -> int:
    """The most memory that this process has used so far."""
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def local_path(name: str) -> pathlib.Path:
    """The path with this name. A ~ at its start, which shells leave in --flag=~/NAME, is the user's home directory.

    Raises:
        errors.UserError: if it begins with ~ and there is no such home directory.
    """
    try:
        return pathlib.Path(name).expanduser()
    except RuntimeError as error:
        raise errors.UserError(f"{name} names a home directory that is not known", remedy="write it out") from error


def num_cores() -> int:
    """Cores that this process may use, which a job scheduler or a container may limit to some of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_huge_pages() -> None:
    """Restarts this process with huge pages in malloc, if the system gives them on request (madvise, glibc 2.35).

    Every step allocates new memory for its arrays. On a CPU, first access to it in small pages takes a fifth of the
    step's time. If the user has set GLIBC_TUNABLES, nothing changes. Ctrl-C waits until the program has begun again:
    it would end Python's own start without a word, or with a traceback.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # Where it has begun again.
    with contextlib.suppress(OSError):  # Not Linux.
        if "[madvise]" in HUGE_PAGES.read_text() and "GLIBC_TUNABLES" not in os.environ:
            os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
            with interrupts.blocked():
                os.execv(sys.executable, sys.orig_argv)


def revision() -> str | None:
    """The git commit of this program, with a + if files have changed since; None if it is not in a checkout."""
    here = pathlib.Path(__file__)

    def git(*question: str) -> str:
        command = ["git", "-C", str(here.parent), *question]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # Fails if this file is only installed somewhere in a checkout.
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "..") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def cache_directory() -> pathlib.Path:
    """The directory for files that this program can make or download again.

    Raises:
        errors.UserError: where the user has no home directory.
    """
    if given := os.environ.get("XDG_CACHE_HOME"):
        return pathlib.Path(given) / "sedd_jax"
    try:
        return pathlib.Path.home() / ".cache" / "sedd_jax"
    except RuntimeError as error:
        raise errors.UserError("this user has no home directory", remedy="set HOME or XDG_CACHE_HOME") from error


def keep_compiled_programs() -> None:
    """Turns on JAX's persistent compilation cache, in the user's cache directory.

    JAX then keeps programs that take over a second to compile. If JAX_COMPILATION_CACHE_DIR is set, nothing changes,
    nor if the user has no home directory; `sedd doctor` says so.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    # Each processor model gets its own cache. JAX does not distinguish them, but a program for one may fail on another.
    core = _cpuinfo()
    features = core.get("flags", core.get("Features"))
    kind = hashlib.sha256(f"{platform.machine()} {core.get('model name')} {features}".encode()).hexdigest()[:12]
    with contextlib.suppress(errors.UserError):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache_directory() / kind)


def use_accelerator_flags() -> None:
    """Adds the flags in `ACCELERATOR_FLAGS` to the environment. Call it before importing JAX.

    A flag that is set already, by the user or a launcher, stays as it is.
    """
    flags = ACCELERATOR_FLAGS.read_text().splitlines()
    for variable, prefix in (("LIBTPU_INIT_ARGS", "--xla_tpu_"), ("XLA_FLAGS", "--xla_gpu_")):
        given = os.environ.get(variable, "").split()
        if given and not given[0].startswith("-"):
            continue  # The name of a file of flags.
        names = [flag.partition("=")[0] for flag in given]
        missing = [flag for flag in flags if flag.startswith(prefix) and flag.partition("=")[0] not in names]
        os.environ[variable] = " ".join([*missing, *given])


def compile_for_others() -> None:
    """Keeps JAX from looking for devices on this machine, to compile for others. Call it before importing JAX."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
    # JAX's plugin for GPUs then loads without CUDA's libraries.
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Discards all output to standard error, including that of native libraries."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _cpuinfo() -> dict[str, str]:
    """Fields of the first core in /proc/cpuinfo; empty if it cannot be read."""
    try:
        first = CPUINFO.read_text().partition("\n\n")[0]
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
