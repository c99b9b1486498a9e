"""What commands share: flags, configs given on the command line, and help."""

import dataclasses
import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from absl import flags

from sedd_jax.runtime import errors

Command = Callable[[list[str]], int | None]  # From arguments to an exit status, None for success.


def parse_config(
    command: Command, values: flags.FlagValues, argv: list[str], *directories: str
) -> dict[str, Any] | None:
    """`parse` for a command that takes a config, validated; None where help was asked for, which it prints."""
    from ml_collections import config_flags

    from sedd_jax import config as configs

    path, partial, rest = _load_config(argv)
    merged = configs.merge(partial)
    if asks_for_help(rest):
        print_help(command, values, ["--config=FILE  a configs/NAME.py; without one every field has the default below"])
        fields = "\n".join(f"  --config.{name}={value!r}  {doc}" for name, value, doc in configs.describe(merged))
        print(f"\nconfig fields{f' as {path} sets them' if path else ''}:\n{fields}")
        return None
    for argument in rest:
        if argument.lstrip("-").startswith("config."):
            configs.check_field(argument.lstrip("-").removeprefix("config.").partition("=")[0], merged)
    config_flags.DEFINE_config_dict("config", merged, flag_values=values, sys_argv=["sedd", *rest])
    given = {name: value for name, value in parse(values, rest, *directories).items() if "." not in name}
    return given | {"config": configs.parse(given["config"])}


def refinements() -> tuple[str, ...]:
    """Names of the flags that refine any sampler."""
    from sedd_jax.model import sampling_config

    return tuple(sampling_config.REFINEMENTS)


def define_sampling(values: flags.FlagValues, *names: str) -> None:
    """Flags that set fields of a run's sampling config; what is not given is the run's own."""
    from sedd_jax import config as configs

    define: dict[Any, Any] = {str: flags.DEFINE_string, int: flags.DEFINE_integer, float: flags.DEFINE_float}
    kinds = {field.name: field.type for field in dataclasses.fields(configs.SamplingConfig)}
    meanings = {name: meaning for name, _, meaning in configs.describe(configs.default())}
    for name in names:
        define[kinds[name]](name, None, meanings[f"sampling.{name}"], flag_values=values)


def define_processes(values: flags.FlagValues) -> None:
    """Flags that say which of many processes this is."""
    flags.DEFINE_string("coordinator_address", None, "host:port of process 0, of many", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "processes; TPU pods, SLURM and GKE tell", flag_values=values)
    flags.DEFINE_integer("process_id", None, "this one's number, from 0", flag_values=values)


def join_processes(given: dict[str, Any]) -> bool:
    """Takes the flags of `define_processes` out and obeys them; whether this is the process whose results are kept."""
    from sedd_jax.runtime import processes

    processes.join(*(given.pop(name) for name in ("coordinator_address", "num_processes", "process_id")))
    if not processes.is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, it stays open
    return processes.is_first()


def _load_config(argv: list[str]) -> tuple[str, Any, list[str]]:
    """Takes --config=FILE out of the arguments: its path, the fields it sets, and the other arguments."""
    path, rest = "", []
    arguments = iter(argv)
    for argument in arguments:
        if argument in ("--config", "-config"):
            path = next(arguments, "")
        elif argument.startswith(("--config=", "-config=")):
            path = argument.partition("=")[2]
        else:
            rest.append(argument)
    if not path:
        return path, {}, rest
    if not pathlib.Path(path).is_file():
        raise errors.UserError("is not a file", field="config", value=path, remedy="give one of configs/*.py")
    spec = importlib.util.spec_from_file_location("sedd_config", path)
    if spec is None or spec.loader is None:
        raise errors.UserError("is not a Python file", field="config", value=path, remedy="give one of configs/*.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return path, module.get_config(), rest
    except Exception as error:
        # The file is the user's, and so is what goes wrong in it.
        problem = f"fails with {type(error).__name__}: {error}"
        raise errors.UserError(problem, field="config", value=path, remedy="mend the file") from error


def parse(values: flags.FlagValues, argv: list[str], *directories: str) -> dict[str, Any]:
    """Values of all flags by name; `directories` must be given and become paths."""
    from sedd_jax.runtime import storage

    remaining = values(["sedd", *argv])
    if len(remaining) > 1:
        raise flags.UnrecognizedFlagError(remaining[1])
    given: dict[str, Any] = {name: values[name].value for name in values}
    for name in directories:
        if not given[name]:
            raise flags.IllegalFlagValueError(f"--{name}=DIR must be given")
        given[name] = storage.directory(given[name])
    return given


def asks_for_help(argv: list[str]) -> bool:
    """Whether a command is asked what it takes."""
    return any(argument in ("--help", "-h", "-help") for argument in argv)


def print_help(command: Command, values: flags.FlagValues, extra: list[str] | None = None) -> None:
    """What a command does and takes, to standard output."""
    summary, _, example = (line.strip() for line in (command.__doc__ or "").strip().splitlines()[:3])
    print(f"{summary}\n\n  {example}\n\nflags:")
    for line in extra or []:
        print(f"  {line}")
    for name in values:
        default = values[name].default
        print(f"  --{name}{'' if default is None else f'={default!r}'}  {values[name].help}")
