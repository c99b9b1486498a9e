"""Configs in files: those that a user writes in Python, and config.json of a run directory."""

import dataclasses
import importlib.util
import os
from typing import Any

from sedd_jax import config as configs
from sedd_jax.runtime import errors, packaged


def read_python(path: str | os.PathLike[str]) -> configs.Nested:
    """The fields that a Python file, or a packaged config such as quickstart, sets: what its `get_config()` returns.

    Raises:
        errors.UserError: where `path` is neither, or the file fails.
    """
    refuse = lambda problem, remedy: errors.UserError(problem, field="config", value=path, remedy=remedy)
    file = packaged.config_file(path)
    spec = importlib.util.spec_from_file_location("sedd_config", file)
    if not file.is_file() or spec is None or spec.loader is None:
        names = packaged.config_names()
        hint = errors.nearest(os.fspath(path), names)
        raise refuse("is not a file of Python", f"{hint}give a path, or one of {', '.join(names)}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        found = module.get_config()
    except (Exception, SystemExit) as error:
        # The user wrote the file, so any exception in it is the user's error.
        raise refuse(f"fails with {type(error).__name__}: {error}", "mend the file") from error
    if not isinstance(found, configs.SECTION):
        raise refuse(f"returns {found!r}, which is no dict of fields", "mend get_config() as in configs/quickstart.py")
    return found


def read_saved(saved: configs.Nested) -> configs.Config:
    """The config of a run directory, which an earlier version may have written.

    A field that the run lacks was added later. It gets the value that means "as before": `metadata["before"]` of the
    field if there is one, else its default.

    Raises:
        errors.UserError: names a field that is unknown or has an impossible value.
    """
    config = _filled(configs.Config, saved, "")
    remat = config["network"]["remat"]
    if isinstance(remat, bool):  # The type that this field had before.
        config["network"]["remat"] = "blocks" if remat else "none"
    return configs.parse(config)


def _filled(cls: Any, saved: configs.Nested, prefix: str) -> dict[str, Any]:
    """The saved fields of a section; a field that it lacks gets the value that means "as before"."""
    filled = dict(saved)
    for field in dataclasses.fields(cls):
        name = prefix + field.name
        if dataclasses.is_dataclass(field.type):
            filled[field.name] = _filled(field.type, configs.section(name, saved.get(field.name, {})), f"{name}.")
        elif field.default is not dataclasses.MISSING and name not in configs.DERIVED:
            filled.setdefault(field.name, field.metadata.get("before", field.default))
    return filled
