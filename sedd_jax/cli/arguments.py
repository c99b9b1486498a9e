"""What the commands share: flags, configs given on the command line, and help."""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from absl import flags

from sedd_jax.runtime import packaged

if TYPE_CHECKING:
    from sedd_jax import config as configs

_CONFIG_HELP = "--config=FILE  a file of Python, or one of {}; the defaults below if not given"

# How Python begins to say that a text is no value of a type, and what was expected.
_EXPECTED = {
    "invalid literal for int": "a whole number",
    "could not convert string to float": "a number",
    "('Non-boolean argument": "true or false",
}

Command = Callable[[list[str]], int | None]  # Takes arguments, returns an exit status (None: success).
Define = Callable[..., object]  # Defines a flag from its name, default and help, and for numbers the limits.


def parse_config(
    command: Command, values: flags.FlagValues, argv: list[str], *directories: str
) -> dict[str, Any] | None:
    """`parse` for a command that takes a config, which is validated. If help was asked for, prints it: None."""
    from ml_collections import config_flags

    from sedd_jax import config as configs

    path, partial, rest = _load_config(argv)
    merged = configs.merge(partial)
    if asks_for_help(rest):
        print_help(command, values, [_CONFIG_HELP.format(", ".join(packaged.config_names()))])
        fields = "\n".join(f"  --config.{name}={value!r}  {doc}" for name, value, doc in configs.describe(merged))
        print(f"\nconfig fields{f' with the values of {path}' if path else ''}:\n{fields}")
        return None
    for argument in rest:
        if argument.lstrip("-").startswith("config."):
            configs.check_field(argument.lstrip("-").removeprefix("config.").partition("=")[0], merged)
    config_flags.DEFINE_config_dict("config", merged, flag_values=values, sys_argv=["sedd", *rest])
    given = {name: value for name, value in parse(values, rest, *directories).items() if "." not in name}
    return given | {"config": configs.parse(given["config"])}


def definers(values: flags.FlagValues) -> tuple[Define, Define, Define]:
    """Functions that define a flag of `values`: a text, a whole number, and a choice of yes or no."""
    define = lambda kind: functools.partial(kind, flag_values=values)
    return define(flags.DEFINE_string), define(flags.DEFINE_integer), define(flags.DEFINE_bool)


def refinements() -> tuple[str, ...]:
    """Names of the flags that refine any sampler."""
    from sedd_jax.model import sampling_config

    return tuple(sampling_config.REFINEMENTS)


def define_sampling(values: flags.FlagValues, *names: str) -> None:
    """Defines flags that set fields of a run's sampling config. A flag that is not given leaves the run's value."""
    from sedd_jax import config as configs

    define: dict[Any, Any] = {str: flags.DEFINE_string, int: flags.DEFINE_integer, float: flags.DEFINE_float}
    kinds = {field.name: field.type for field in dataclasses.fields(configs.SamplingConfig)}
    meanings = {name: meaning for name, _, meaning in configs.describe(configs.default())}
    for name in names:
        define[kinds[name]](name, None, meanings[f"sampling.{name}"], flag_values=values)


def define_processes(values: flags.FlagValues) -> None:
    """Defines the flags of a program that runs in several processes."""
    text, number, _ = definers(values)
    text("coordinator_address", None, "host:port of process 0; found automatically on TPU pods, SLURM and GKE")
    number("num_processes", None, "number of processes; found automatically as above")
    number("process_id", None, "number of this process, from 0; found automatically as above")


def join_processes(given: dict[str, Any]) -> bool:
    """Removes the flags of `define_processes` from `given` and joins the other processes.

    Only the first process writes results. The standard output of the others is discarded.

    Returns:
        Whether this is the first process.
    """
    from sedd_jax.runtime import processes

    processes.join(*(given.pop(name) for name in ("coordinator_address", "num_processes", "process_id")))
    if not processes.is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, it stays open.
    return processes.is_first()


def _load_config(argv: list[str]) -> tuple[str, "configs.Nested", list[str]]:
    """What --config=FILE gives ("" if not given), the fields that the file sets, and the other arguments."""
    from sedd_jax import config_files

    path, rest = "", []
    arguments = iter(argv)
    for argument in arguments:
        if argument.partition("=")[0] not in ("--config", "-config"):
            rest.append(argument)
            continue
        path = argument.partition("=")[2] if "=" in argument else next(arguments, "")
        if not path:
            raise flags.IllegalFlagValueError("--config=FILE names no file")
    return path, config_files.read_python(path) if path else {}, rest


def parse(values: flags.FlagValues, argv: list[str], *directories: str) -> dict[str, Any]:
    """Values of all flags by name. The flags in `directories` must be given; their values become paths."""
    from sedd_jax.runtime import storage

    try:
        remaining = values(["sedd", *argv])
    except flags.IllegalFlagValueError as error:
        raise flags.IllegalFlagValueError(_plain(str(error))) from error
    if len(remaining) > 1:
        raise flags.IllegalFlagValueError(
            f"{remaining[1]!r} belongs to no flag: write --NAME=VALUE, in quotes where it holds spaces"
        )
    given: dict[str, Any] = {name: values[name].value for name in values}
    for name in (name for name in values if values[name].default is None and name not in directories):
        if given[name] == "":
            raise flags.IllegalFlagValueError(f"--{name}= is empty: give a value, or leave the flag out")
    for name in directories:
        if not given[name]:
            raise flags.IllegalFlagValueError(f"--{name}=DIR must be given")
        given[name] = storage.directory(given[name])
    return given


def _plain(message: str) -> str:
    """What absl says of a wrong value, in words that need no knowledge of Python."""
    shown, _, why = message.partition(": ")
    for start, expected in _EXPECTED.items():
        if why.startswith(start):
            return f"{shown.removeprefix('flag ')} is not {expected}"
    return message


def asks_for_help(argv: list[str]) -> bool:
    """Whether the arguments ask for help."""
    return any(argument in ("--help", "-h", "-help") for argument in argv)


def print_help(command: Command, values: flags.FlagValues, extra: list[str] | None = None) -> None:
    """Prints what a command does and its flags to standard output."""
    summary, _, example = (line.strip() for line in (command.__doc__ or "").strip().splitlines()[:3])
    print(f"{summary}\n\n  {example}\n\nflags:")
    for line in extra or []:
        print(f"  {line}")
    for name in values:
        default = values[name].default
        print(f"  --{name}{'' if default is None else f'={default!r}'}  {values[name].help}")
