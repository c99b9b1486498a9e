"""Settings for the host machine, on fake machines."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

from sedd_jax.runtime import errors, hosts, storage

CPUINFO = "processor\t: 0\nmodel name\t: Some CPU 1\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nmodel name\t: other\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A fake machine made of files, with an empty environment. Restarts are recorded and not done."""
    monkeypatch.setattr(hosts, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(hosts, "HUGE_PAGES", tmp_path / "enabled")
    hosts.CPUINFO.write_text(CPUINFO)
    monkeypatch.setattr(os, "environ", {"XDG_CACHE_HOME": "/cache"})
    starts = []
    monkeypatch.setattr(os, "execv", lambda *arguments: starts.append(arguments))
    return starts


def test_huge_pages_are_asked_for_once(machine):
    hosts.HUGE_PAGES.write_text("always [madvise] never\n")
    hosts.use_huge_pages()
    assert machine == [(sys.executable, sys.orig_argv)]
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    hosts.use_huge_pages()
    assert len(machine) == 1


@pytest.mark.parametrize("modes", ["[always] madvise never", "always madvise [never]", None])
def test_a_system_that_gives_them_to_all_or_none_is_left_alone(machine, modes):
    if modes:
        hosts.HUGE_PAGES.write_text(modes)
    hosts.use_huge_pages()
    assert not machine


def test_the_users_tunables_stay(machine):
    hosts.HUGE_PAGES.write_text("always [madvise] never\n")
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.check=1"
    hosts.use_huge_pages()
    assert not machine


def test_compiled_programs_are_kept_for_each_processor(machine):
    hosts.keep_compiled_programs()
    first = os.environ.pop("JAX_COMPILATION_CACHE_DIR")
    assert first.startswith("/cache/sedd_jax/")
    hosts.CPUINFO.write_text(CPUINFO.replace("avx2", "avx512"))
    hosts.keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] != first


def test_the_users_cache_stays(machine):
    os.environ["JAX_COMPILATION_CACHE_DIR"] = "/mine"
    hosts.keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/mine"


def test_without_a_home_nothing_is_kept_and_a_directory_that_is_needed_is_asked_for(machine, monkeypatch):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "home", fail)
    assert hosts.cache_directory() == pathlib.Path("/cache/sedd_jax")
    os.environ["XDG_CACHE_HOME"] = ""
    hosts.keep_compiled_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    with pytest.raises(errors.UserError, match="no home directory: set HOME or XDG_CACHE_HOME"):
        hosts.cache_directory()


@pytest.mark.parametrize(
    ("limit", "expected"), [("1048576\n", 1048576), (f"{2**60}\n", None), ("max\n", None), (None, None)]
)
def test_memory_is_at_most_what_the_container_may_use(machine, tmp_path, monkeypatch, limit, expected):
    monkeypatch.setattr(hosts, "CONTAINER_MEMORY", tmp_path / "memory.max")
    if limit:
        hosts.CONTAINER_MEMORY.write_text(limit)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert hosts.memory_bytes() == (expected or total)


def test_memory_is_at_most_what_the_shell_allows(monkeypatch):
    monkeypatch.setattr(hosts.resource, "getrlimit", lambda kind: (2**20, 2**40))
    assert hosts.memory_bytes() == 2**20


def test_a_tilde_that_the_shell_left_is_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert hosts.local_path("~/runs/x") == pathlib.Path("/home/me/runs/x")
    assert hosts.local_path("runs/~x") == pathlib.Path("runs/~x")
    assert storage.directory("~/runs/x") == pathlib.Path("/home/me/runs/x")
    with pytest.raises(errors.UserError, match="~nobody-of-this-name/x names a home directory that is not known"):
        hosts.local_path("~nobody-of-this-name/x")


def test_cores_are_those_of_the_job(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert hosts.num_cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert hosts.num_cores() == 128


def test_processor_is_the_first_cores(machine):
    assert hosts.processor() == "Some CPU 1"


def test_silence_ends_and_keeps_errors(capfd):
    def fail():
        with hosts.silenced():
            os.write(2, b"noise")
            raise ValueError("kept")

    with pytest.raises(ValueError, match="kept"):
        fail()
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"


def test_flags_of_accelerators_come_before_the_users_who_wins(machine):
    gpu, tpu = "--xla_gpu_enable_latency_hiding_scheduler", "--xla_tpu_enable_async_collective_fusion_fuse_all_reduce"
    os.environ["XLA_FLAGS"] = "--xla_mine=1"
    for _ in range(2):  # `sedd` may start itself again.
        hosts.use_accelerator_flags()
        assert os.environ["XLA_FLAGS"] == f"{gpu}=true --xla_mine=1"
        assert os.environ["LIBTPU_INIT_ARGS"] == f"{tpu}=true"
    os.environ["XLA_FLAGS"] = f"--xla_mine=1 {gpu}=false"
    hosts.use_accelerator_flags()
    assert os.environ["XLA_FLAGS"] == f"--xla_mine=1 {gpu}=false"


def test_a_file_of_flags_stays(machine):
    os.environ["XLA_FLAGS"] = "/mine"
    hosts.use_accelerator_flags()
    assert os.environ["XLA_FLAGS"] == "/mine"


STARTS = """
import jax, os
from sedd_jax.cli import main
main.main = lambda argv: 0
try:
    main.run()
except SystemExit:
    print(os.environ["XLA_FLAGS"], flush=True)
"""
# NVIDIA's plugin reads the flags, too, when it compiles, for which no GPU has to be here.
COMPILES = {
    "XLA": "jax.numpy.zeros(1)",
    "NVIDIA": """
from jax.experimental import topologies
h100 = '''gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 19 } runtime_version { major: 13 }'''
devices = topologies.get_topology_desc(platform="cuda", target_config=h100, topology="1x1x1").devices
x = jax.ShapeDtypeStruct((8,), "float32", sharding=jax.sharding.SingleDeviceSharding(devices[0]))
jax.jit(lambda x: x + 1).lower(x).compile()
""",
}


@pytest.mark.parametrize("compiler", COMPILES)
@pytest.mark.parametrize("unknown", ["", "--xla_gpu_of_no_version=true"])
def test_sedd_sets_flags_that_the_compilers_here_know(compiler, unknown):
    """Both end the process where they do not know a flag."""
    if compiler == "NVIDIA" and importlib.util.find_spec("jax_plugins") is None:
        pytest.skip("JAX for NVIDIA GPUs is not installed: pip install '.[gpu]'")
    environment = os.environ | {
        "XLA_FLAGS": unknown,
        "JAX_PLATFORMS": "cpu",
        "GLIBC_TUNABLES": "",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    }
    command = [sys.executable, "-c", STARTS + COMPILES[compiler]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" in done.stdout, done.stderr
    assert (done.returncode != 0) == bool(unknown), done.stderr
