"""The configs that travel with the package: sedd_jax/configs in a wheel, configs/ beside the package in a checkout."""

import os
import pathlib

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]
_PLACES = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def config_names() -> list[str]:
    """Names of the packaged configs, such as "quickstart", in alphabetical order."""
    return sorted(path.stem for path in _folder().glob("*.py"))


def config_file(given: str | os.PathLike[str]) -> pathlib.Path:
    """The file of a config: the packaged one for one of `config_names`, any other text is a path."""
    return _folder() / f"{given}.py" if os.fspath(given) in config_names() else pathlib.Path(given)


def _folder() -> pathlib.Path:
    return next(place for place in _PLACES if place.is_dir())
