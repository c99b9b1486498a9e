"""Without libtpu, `sedd plan` says what to install."""

import pytest

from tests.support import forks

# What JAX says, in the place of whether libtpu is installed here.
PRELUDE = """
from jax.experimental import topologies

def refuse(*_, **__):
    raise RuntimeError({message!r})

topologies.get_topology_desc = refuse
"""


@pytest.mark.parametrize(
    "message",
    [
        "JAX TPU support not installed; cannot generate TPU topology. See https://github.com/jax-ml/jax#installation",
        "No jax plugin found",
    ],
)
def test_without_libtpu_one_line_says_what_to_install(message):
    child = forks.server().start("plan", "--topology=v5e:4x4", prelude=PRELUDE.format(message=message))
    _, err = child.communicate()
    assert err == "sedd plan: plan needs libtpu: pip install 'sedd_jax[tpu-plan]'\n"
    assert child.returncode == 1
