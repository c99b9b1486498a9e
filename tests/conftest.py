"""The strict harness: eight CPU devices, shapes checked; rank promotion, key reuse and (by pyproject) warnings fail."""

import os

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
def golden():
    """Loads a recorded file by its name."""
    import goldens  # Not at the top: it imports sedd_jax, which the hook above must see first.

    return goldens.load
