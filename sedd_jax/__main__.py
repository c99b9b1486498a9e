"""`python -m sedd_jax` is `sedd`."""

from sedd_jax import cli

cli.run()
