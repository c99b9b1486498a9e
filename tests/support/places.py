"""Where tests find the repository, what was recorded, and the files that only its developers have."""

import pathlib

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "sedd_jax"
GOLDEN = pathlib.Path(__file__).parent / "golden"
SHARED = REPOSITORY.parent / "shared"
