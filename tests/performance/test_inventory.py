"""What is found on machines that are not here: GPUs and TPUs that JAX does not see, and JAX that does not start."""

import logging
import re
import sys
import types

import jax
import pytest
from jax._src import lib

from sedd_jax.performance import inventory
from sedd_jax.runtime import errors

VERSIONS = {"jax": "0.10.2", "jaxlib": "0.10.2"}
CPU = inventory.Devices([types.SimpleNamespace(platform="cpu")], [])
GPU = inventory.Devices([types.SimpleNamespace(platform="gpu")], [])
NO_GPU = inventory.Nvidia([])
H200 = inventory.Nvidia(["NVIDIA H200", "NVIDIA H200"], "590.10")


@pytest.fixture(autouse=True)
def bare(tmp_path, monkeypatch):
    """A machine without devices, nvidia-smi and settings."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(inventory, "DEV", tmp_path / "dev")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def texts(versions=VERSIONS, gpus=NO_GPU, started=CPU):
    """Problems as text; those that are fatal begin with FAILS."""
    return [
        ("FAILS " if problem.is_fatal else "") + problem.text for problem in inventory.problems(versions, gpus, started)
    ]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (None, ([], "", "")),
        (
            "#!/bin/sh\necho 'NVIDIA H200, 590.10'\necho 'NVIDIA L4, 590.10'",
            (["NVIDIA H200", "NVIDIA L4"], "590.10", ""),
        ),
        ("#!/bin/sh\necho 'NVIDIA-SMI has failed,\n no driver'; exit 9", ([], "", "NVIDIA-SMI has failed, no driver")),
        ("#!/bin/sh\necho 'No devices were found'", ([], "", "No devices were found")),
        ("#!/bin/sh\necho 'GPU 0 is lost, reboot'; exit 15", ([], "", "GPU 0 is lost, reboot")),
        ("#!/bin/sh\nexit 3", ([], "", "exit status 3")),
        ("#!/no/such/shell\n", ([], "", "No such file or directory")),
    ],
)
def test_nvidia_smi(bare, script, expected):
    if script:
        path = bare / "bin" / "nvidia-smi"
        path.write_text(script)
        path.chmod(0o755)
    gpus, driver, failure = inventory.nvidia()
    assert (gpus, driver) == expected[:2]
    assert expected[2] in failure
    assert bool(failure) == bool(expected[2])


def test_a_machine_without_accelerators_has_no_problem():
    assert texts() == []


@pytest.mark.parametrize(
    ("versions", "driver", "remedy"),
    [
        ({}, "590.10", "no CUDA plugin is installed: pip install 'sedd_jax[gpu]'"),
        (
            {"jax-cuda13-plugin": "0.10.1"},
            "590.10",
            "jax-cuda13-plugin 0.10.1 does not match jaxlib 0.10.2: pip install 'jax[cuda13]==0.10.2'",
        ),
        (
            {"jax-cuda13-plugin": "0.10.2"},
            "570.10",
            "driver 570.10 is too old for jax-cuda13-plugin (CUDA is unhappy): install driver 580 or newer",
        ),
        (
            {"jax-cuda12-plugin": "0.10.2"},
            "570.10",
            "CUDA is unhappy: pip install --force-reinstall 'jax[cuda12]==0.10.2'",
        ),
    ],
)
def test_a_gpu_that_jax_does_not_see_is_fatal(versions, driver, remedy):
    started = CPU._replace(heard=["CUDA is unhappy"])
    (text,) = texts(VERSIONS | versions, H200._replace(driver=driver), started)
    assert text == f"FAILS JAX does not see NVIDIA H200: {remedy}, or set JAX_PLATFORMS=cpu to do without it."
    assert texts(VERSIONS | versions, H200._replace(driver=driver), GPU) == []


def test_a_gpu_may_be_hidden(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (text,) = texts(VERSIONS | {"jax-cuda13-plugin": "0.10.2"}, H200)
    assert "CUDA_VISIBLE_DEVICES='' may hide it (JAX does not say why): unset CUDA_VISIBLE_DEVICES" in text


def test_device_files_show_a_gpu_where_nvidia_smi_does_not(bare):
    failed = inventory.Nvidia([], failure="no driver")
    (bare / "dev" / "nvidiactl").touch()
    assert texts(gpus=failed) == [
        "nvidia-smi lists no GPU (no driver): if this machine has a GPU, install its driver again."
    ]
    (bare / "dev" / "nvidia0").touch()
    (text,) = texts(VERSIONS | {"jax-cuda13-plugin": "0.10.2"}, failed)
    assert text.startswith(
        f"FAILS JAX does not see {bare}/dev/nvidia0: nvidia-smi fails (no driver): install the driver"
    )


@pytest.mark.parametrize("file", ["accel0", "vfio/0"])
@pytest.mark.parametrize(
    ("versions", "why"),
    [
        ({}, "libtpu is not installed: pip install 'sedd_jax[tpu]'"),
        (
            {"libtpu": "0.0.42"},
            "in use: end other programs that use it, or pip install --force-reinstall 'jax[tpu]==0.10.2'",
        ),
    ],
)
def test_a_tpu_that_jax_does_not_see_is_fatal(bare, file, versions, why):
    (bare / "dev" / "vfio").mkdir()
    (bare / "dev" / "vfio" / "vfio").touch()
    assert texts() == []
    (bare / "dev" / file).touch()
    (text,) = texts(VERSIONS | versions, started=CPU._replace(heard=["in use"]))
    assert (
        text
        == f"FAILS JAX does not see the TPU at {bare}/dev/{file}: {why}, or set JAX_PLATFORMS=cpu to do without it."
    )


def test_who_asked_for_the_cpu_gets_it(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert texts(gpus=H200) == ["JAX_PLATFORMS=cpu keeps JAX from NVIDIA H200: unset it to train there."]


def test_a_platform_that_is_not_here(monkeypatch):
    nothing = inventory.Devices([], [], "no such backend")
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    assert texts(started=nothing) == [
        "FAILS JAX does not start with JAX_PLATFORMS='tpu' (no such backend): unset JAX_PLATFORMS."
    ]
    assert texts(gpus=H200, started=nothing) == texts(started=nothing)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    (text,) = texts(gpus=H200, started=nothing)
    assert "FAILS JAX does not see NVIDIA H200: no CUDA plugin is installed" in text


def test_other_warnings_of_jax_are_shown():
    assert texts(gpus=H200, started=GPU._replace(heard=["cuBLAS is old"])) == ["JAX warns: cuBLAS is old"]


def test_jax_is_heard_and_its_failure_is_one_line(monkeypatch, caplog):
    logger = logging.getLogger("jax._src.xla_bridge")
    caplog.set_level(logging.CRITICAL, logger="jax")

    def fail():
        logger.warning("no %s,\n sorry", "driver")
        logger.info("not heard")
        raise RuntimeError("cannot\nstart")

    monkeypatch.setattr(jax, "devices", fail)
    assert inventory.devices() == ([], ["no driver, sorry"], "cannot start")
    assert logging.getLogger("jax").level == logging.CRITICAL
    assert logging.getLogger("jax").propagate


@pytest.mark.parametrize("name", ["jax", "optax"])
def test_a_library_that_cannot_be_imported_is_a_user_error(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(errors.UserError, match=rf"{name} cannot be imported") as raised:
        inventory.check_imports()
    assert re.match(
        r"pip install --force-reinstall 'jax[<>=\d.,]+' 'flax[^']+' 'optax[^']+' 'orbax", raised.value.remedy
    )


def test_versions_of_cuda_libraries(monkeypatch):
    def fail():
        raise RuntimeError("libcudnn.so.9:\n cannot open")

    versions = types.SimpleNamespace(cuda_runtime_get_version=lambda: 12090, cudnn_get_version=lambda: 91900)
    monkeypatch.setattr(lib, "cuda_versions", versions)
    assert inventory.cuda_libraries() == {"CUDA": "12.9", "cuDNN": "9.19"}
    versions.cudnn_get_version = fail
    assert inventory.cuda_libraries()["cuDNN"] == "cannot be loaded: libcudnn.so.9: cannot open"
    monkeypatch.setattr(lib, "cuda_versions", None)
    assert inventory.cuda_libraries() == {}


def test_cache_of_compiled_programs(tmp_path):
    place = tmp_path / "new" / "cache"
    assert inventory.cache(str(place)) == (f"kept in {place}, writable", None)
    assert list(place.iterdir()) == []
    assert inventory.cache("gs://bucket/cache")[1] is None
    (tmp_path / "file").touch()
    said, problem = inventory.cache(str(tmp_path / "file" / "cache"))
    assert "not writable" in said
    assert not problem.is_fatal
    assert "set JAX_COMPILATION_CACHE_DIR to a directory that is" in problem.text
    said, problem = inventory.cache(None)
    assert "set HOME, XDG_CACHE_HOME or JAX_COMPILATION_CACHE_DIR" in problem.text
    assert not problem.is_fatal


def test_machine_and_packages_are_this_ones():
    assert inventory.machine()["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert inventory.packages()["jax"] == jax.__version__
