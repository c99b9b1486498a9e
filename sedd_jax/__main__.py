"""`python -m sedd_jax` is `sedd`."""

from sedd_jax.cli import main as cli

cli.run()
