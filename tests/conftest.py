"""The strict harness: eight CPU devices, shapes checked; rank promotion, key reuse and (by pyproject) warnings fail."""

import os
import shutil
import subprocess

os.environ["JAX_PLATFORMS"] = "cpu"
# Compilation is most of what tests do, so it optimises less.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=1"

import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
jaxtyping.install_import_hook("sedd_jax", "beartype.beartype")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount the small file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def golden():
    """Loads a recorded file by its name."""
    import goldens  # Not at the top: it imports sedd_jax, which the hook above must see first.

    return goldens.load
