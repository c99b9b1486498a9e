"""The machine a program runs on: what it is, and what is asked of it before JAX starts."""

import contextlib
import hashlib
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Iterator

CPUINFO = pathlib.Path("/proc/cpuinfo")
HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def processor() -> str:
    """The processor's name."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def use_huge_pages() -> None:
    """Starts this process again with huge pages in malloc, where the system gives them to who asks (glibc 2.35).

    A step's arrays are fresh memory each time, and on a CPU touching it in small pages takes a fifth of the step. What
    the user has set in GLIBC_TUNABLES stays.
    """
    with contextlib.suppress(OSError):  # Not Linux.
        if "[madvise]" in HUGE_PAGES.read_text() and "GLIBC_TUNABLES" not in os.environ:
            os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
            os.execv(sys.executable, sys.orig_argv)


def revision() -> str | None:
    """The commit of this program's checkout, with a + where it was changed since; None where it is installed."""
    here = pathlib.Path(__file__)

    def git(*question: str) -> str:
        command = ["git", "-C", str(here.parent), *question]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # A checkout may hold the environment that this is installed in.
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "..") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def cache_directory() -> pathlib.Path:
    """Where this program keeps what it can make or fetch again."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "sedd_jax"


def keep_compiled_programs() -> None:
    """Lets JAX keep what takes it over a second to compile, in the user's cache, unless told where or not to."""
    # JAX does not tell processors apart, and a program compiled for one may not run on another.
    core = _cpuinfo()
    features = core.get("flags", core.get("Features"))
    kind = hashlib.sha256(f"{platform.machine()} {core.get('model name')} {features}".encode()).hexdigest()[:12]
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_directory() / kind))


def compile_for_others() -> None:
    """Keeps JAX from looking for a TPU here; to be called before it is imported."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Keeps what libraries write to standard error from below Python out of it."""
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
    """Fields of the first core; none where the system does not tell."""
    try:
        first = CPUINFO.read_text().partition("\n\n")[0]
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
