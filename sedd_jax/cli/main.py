"""The command line, `sedd COMMAND`. Results go to stdout, everything else to stderr."""

import functools
import json
import logging as python_logging
import pathlib
import sys

from absl import flags, logging

from sedd_jax.cli import arguments, output, push, run_list, versions
from sedd_jax.runtime import device_failures, errors, hosts, interrupts

_HELP = ("--help", "-h", "help")
_VERSION = "--version"
TRY_AGAIN = 75  # EX_TEMPFAIL: launchers restart a run that exits with this status.


def run() -> None:
    """Runs the command of the process's arguments and ends the process with its status."""
    hosts.use_huge_pages()
    hosts.keep_compiled_programs()
    hosts.use_accelerator_flags()
    interrupts.keep()
    python_logging.getLogger("asyncio").setLevel(python_logging.CRITICAL)
    output.prepare()
    status = main(sys.argv[1:])
    why = output.finish()
    interrupts.end(_fail("sedd", f"the results cannot be printed ({why})", 1) if why else status)


def main(argv: list[str]) -> int:
    """Runs one command and returns its exit status.

    The status is 0 on success, 1 for a failure, 2 for wrong arguments, 75 for a stopped run and 130 for an interrupt.
    A failure that the user can mend is one line on stderr. Any other exception is a bug of this program: it propagates
    with a note that asks for a report.
    """
    name, *rest = argv or ["help"]
    if name not in COMMANDS and name not in (*_HELP, _VERSION):
        return _fail("sedd", f"unknown command {name!r}: choose one of {', '.join(COMMANDS)}", 2)
    logging.set_verbosity(logging.FATAL)
    logging.use_absl_handler()
    try:
        if name in _HELP:
            print(usage())
            return 0 if argv else 2
        if name == _VERSION:
            print(versions.table())
            return 0
        return COMMANDS[name](rest) or 0
    except (KeyboardInterrupt, Exception) as error:
        if isinstance(error, KeyboardInterrupt) or interrupts.has_come():
            interrupts.arrived()
            return _interrupted(name, rest, error)
        return _failed(name, argv, error)


def _interrupted(name: str, flags_given: list[str], error: BaseException) -> int:
    """Says that Ctrl-C ended the command. C++ of JAX turns some interrupts into other errors."""
    has = lambda flag: any(argument.startswith(flag) for argument in flags_given)
    can_resume = name == "eval" or (name == "train" and not has("--step")) or has("--prompts")
    known = str(error) if isinstance(error, KeyboardInterrupt) else ""
    known = known or ("the same command goes on from what is finished" if can_resume else "")
    return _fail(f"sedd {name}", f"interrupted: {known}" if known else "interrupted", interrupts.STATUS)


def _failed(name: str, argv: list[str], error: Exception) -> int:
    """Says why the command failed; raises what is a bug of this program."""
    if isinstance(error, flags.Error):
        return _fail(f"sedd {name}", f"{error}; see `sedd {name} --help`", 2)
    if isinstance(error, errors.UserError):
        return _fail(f"sedd {name}", error.worded(functools.partial(_spelled, name)), 1)
    if isinstance(error, BrokenPipeError) and output.reader_is_gone():
        return 0
    if isinstance(error, OSError) and error.errno is not None:
        # The operating system refused: the disk is full, or a file may not be read.
        return _fail(f"sedd {name}", errors.refused(error), 1)
    if (explained := device_failures.explained(error, name)) is not None:
        return _fail(f"sedd {name}", explained.worded(functools.partial(_spelled, name)), 1)
    error.add_note(versions.request_for_report(argv))
    raise error


def usage() -> str:
    """The text of `sedd --help`."""
    lines = [f"  {name:<10}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "sedd: score entropy discrete diffusion",
            "",
            *lines,
            "",
            "`sedd COMMAND --help` lists a command's flags, `sedd --version` says what runs here.",
        ]
    )


def train(argv: list[str]) -> int:
    """Train on text; the same command resumes.

    sedd train --config=configs/quickstart.py --workdir=runs/quickstart [--config.a.b=value ...]
    """
    values = flags.FlagValues()
    text, number, choice = arguments.definers(values)
    text("workdir", None, "run directory; created if missing, resumed if it holds a run")
    number("step", None, "checkpoint to resume from, which removes newer ones; the newest if not given")
    choice("json", False, "end with one line of JSON")
    arguments.define_processes(values)
    given = arguments.parse_config(train, values, argv, "workdir")
    if given is None:
        return 0
    arguments.join_processes(given)
    from sedd_jax.training import train as program

    metrics = program.train(given["config"], given["workdir"], from_step=given["step"])
    print("\n".join(f"{name} {value:.6g}" for name, value in metrics.items()))
    if given["json"]:
        print(json.dumps(metrics))
    if metrics["step"] >= given["config"].training.num_steps:
        return 0
    # The same command with --step would resume from that step again and lose the steps since.
    return TRY_AGAIN if given["step"] is None else 1


def prepare(argv: list[str]) -> None:
    """Tokenize a corpus once for any number of runs, or describe prepared text.

    sedd prepare --data=text:books/*.txt --tokenizer=gpt2 --out=data/books | sedd prepare --describe=data/books
    """
    values = flags.FlagValues()
    text, number, choice = arguments.definers(values)
    text("data", None, "source of text: KIND:ARGUMENT, or the name of a corpus")
    text("tokenizer", None, "gpt2, characters, bytes, sentencepiece:N, ...")
    text("out", None, "directory to create, local or gs://")
    number("num_workers", None, "number of processes; one per core if not given")
    text("describe", None, "directory of prepared text to describe; goes without --data and --out")
    choice("json", False, "end with one line of JSON")
    if arguments.asks_for_help(argv):
        arguments.print_help(prepare, values)
        return
    given = arguments.parse(values, argv)
    from sedd_jax.data import prepare as program
    from sedd_jax.runtime import storage

    wanted = {name: given[name] for name in ("data", "tokenizer", "out")}
    if given["describe"] is None:
        for name, value in wanted.items():
            if not value:
                raise flags.IllegalFlagValueError(
                    f"--{name} must be given: give --data, --tokenizer and --out, or --describe"
                )
        directory = storage.directory(given["out"])
        program.prepare(given["data"], given["tokenizer"], directory, num_workers=given["num_workers"])
    else:
        if given["data"] or given["out"]:
            raise flags.IllegalFlagValueError("--describe goes without --data and --out")
        directory = storage.directory(given["describe"])
    description = program.describe(directory, given["tokenizer"] if given["describe"] else None)
    print(program.table(description))
    if given["json"]:
        print(json.dumps(description))


def evaluate(argv: list[str]) -> None:
    """Bound the likelihood of text, measure generated text, or write a report of both.

    sedd eval --workdir=RUN [--data=wikitext2] | --generate|--curve=steps:16,64|--infill=paper --judge=AR_RUN | --report
    """
    from sedd_jax.cli import eval_flags

    values = flags.FlagValues()
    eval_flags.define(values)
    if arguments.asks_for_help(argv):
        arguments.print_help(evaluate, values)
        return
    given = arguments.parse(values, argv, "workdir")
    arguments.join_processes(given)
    from sedd_jax.evaluation import results

    with results.printed_first():
        result, shown = eval_flags.measure(values, given)
        print(shown)
        if given["json"]:
            print(json.dumps(result))


def sample(argv: list[str]) -> None:
    """Sample text from a run, unconditionally or around given text.

    sedd sample --workdir=RUN [--num_steps=128] [--prefix=... --suffix=... | --template='Hi, I am {32}.'] [--watch]
    """
    from sedd_jax.cli import sample_flags

    values = flags.FlagValues()
    sample_flags.define(values)
    if arguments.asks_for_help(argv):
        arguments.print_help(sample, values)
        return
    given = arguments.parse(values, argv, "workdir")
    is_first = arguments.join_processes(given)
    print(sample_flags.draw(given, is_first=is_first))


def tune_grid(argv: list[str]) -> None:
    """Find the time grid at which a run's steps lose the least likelihood, for --grid=tuned.

    sedd tune-grid --workdir=RUN --num_steps=16
    """
    values = flags.FlagValues()
    text, number, choice = arguments.definers(values)
    text("workdir", None, "run directory")
    number("num_steps", 16, "reverse steps of the grid")
    number("step", None, "step of the checkpoint; the newest if not given")
    number("num_sequences", 128, "held-out sequences: one half to tune, the other to test", 2)
    number("batch_size", 32, "sequences in a batch", 1)
    number("seed", 0, "seed of the sequences and the noise", 0, 2**32 - 1)
    choice("json", False, "end with one line of JSON")
    arguments.define_processes(values)
    if arguments.asks_for_help(argv):
        arguments.print_help(tune_grid, values)
        return
    given = arguments.parse(values, argv, "workdir")
    arguments.join_processes(given)
    as_json, workdir = given.pop("json"), given.pop("workdir")
    from sedd_jax.evaluation import results
    from sedd_jax.evaluation import tune_grid as program

    with results.printed_first():
        result = program.tune(workdir, **given)
        print(program.table(result))
        if as_json:
            print(json.dumps(result))


def serve(argv: list[str]) -> int:
    """Serve a local web page to try a run: templates with gaps, samplers side by side, step by step.

    sedd serve --workdir=RUN [--step=N] [--host=127.0.0.1] [--port=8000] [--open]
    """
    values = flags.FlagValues()
    text, number, choice = arguments.definers(values)
    text("workdir", None, "run directory")
    number("step", None, "step of the checkpoint; the newest if not given")
    text("host", "127.0.0.1", "address to listen on; 0.0.0.0 accepts other machines")
    number("port", 8000, "port to listen on; 0 for any free one")
    help_text = "a name under which browsers find the page, behind a proxy or a port mapping; may be repeated"
    flags.DEFINE_multi_string("allowed_host", [], help_text, flag_values=values)
    choice("open", False, "open the page in the browser")
    if arguments.asks_for_help(argv):
        arguments.print_help(serve, values)
        return 0
    given = arguments.parse(values, argv, "workdir")
    from sedd_jax.serving import app as program

    try:
        given |= {"opens": given.pop("open"), "allowed_hosts": given.pop("allowed_host")}
        program.serve(given.pop("workdir"), **given)
    except KeyboardInterrupt:
        return _fail("sedd serve", "stopped", 130)
    return 0


def convert(argv: list[str]) -> None:
    """Convert a checkpoint between run directories, PyTorch's layouts, the Hub and StableHLO.

    sedd convert --from=RUN|DIR|FILE.ckpt|OWNER/NAME --to=DIR [--to_format=torch|jax|stablehlo] [--weights=raw]
    """
    values = flags.FlagValues()
    text, number, choice = arguments.definers(values)
    text("from", None, "run directory, PyTorch directory or file, or OWNER/NAME on the Hub")
    text("to", None, "directory to create")
    text("to_format", None, "torch, jax (a run) or stablehlo; if not given, torch for a run, else jax")
    text("weights", "ema", "ema (the moving average), or raw")
    text("dtype", "float32", "dtype of torch's tensors: float32, bfloat16 or float16")
    number("step", None, "checkpoint of a run; the newest if not given")
    text("tokenizer", "", "for a source without one: gpt2:FILE, text8, ...; by default from the vocabulary size")
    choice("verify", None, "compare with the network in PyTorch; if not given, only if torch is installed")
    choice("json", False, "end with one line of JSON")
    if arguments.asks_for_help(argv):
        arguments.print_help(convert, values)
        return
    given = arguments.parse(values, argv, "from", "to")
    as_json, source = given.pop("json"), given.pop("from")
    from sedd_jax.conversion import convert as program

    target = program.Target(directory=given.pop("to"), to_format=given.pop("to_format"), dtype=given.pop("dtype"))
    result = program.convert(source, target, **given)
    print(program.describe(result))
    if as_json:
        print(json.dumps(result))


def bench(argv: list[str]) -> None:
    """Time a training step and a sampling step of a config, alone or against the published program.

    sedd bench --config=configs/owt_small.py [--config.training.batch_size=1 ...] [--reference=DIR]
    """
    values = flags.FlagValues()
    text, number, choice = arguments.definers(values)
    number("vocab_size", None, "tokens without the mask; the tokenizer's if not given")
    number("repeats", 5, "timings of each program")
    text("reference", None, "checkout of the published PyTorch program, timed in alternation with ours")
    text("reference_python", sys.executable, "Python with torch that runs the published program")
    choice("reference_compile", False, "run the published program under torch.compile")
    choice("json", False, "end with one line of JSON")
    given = arguments.parse_config(bench, values, argv)
    if given is None:
        return
    as_json, reference = given.pop("json"), given.pop("reference")
    from sedd_jax.performance import benchmark as program

    result = program.benchmark(**given, reference=pathlib.Path(reference) if reference else None)
    print(program.table(result))
    if as_json:
        print(json.dumps(result))


def plan(argv: list[str]) -> None:
    """Compile a config's step for TPUs or GPUs without having them: does it fit, what does it cost.

    sedd plan --config=configs/owt_small.py --topology=v5e:4x4|h100:8 [--sample] [--config.a.b=value ...]
    """
    hosts.compile_for_others()
    values = flags.FlagValues()
    text, number, choice = arguments.definers(values)
    text("topology", None, "TPU and chips along each axis, such as v5e:4x4, or GPU and their number in a host: h100:8")
    number("num_slices", 1, "number of TPU slices of that shape")
    number("num_hosts", 1, "number of hosts with so many GPUs")
    number("vocab_size", None, "tokens without the mask; the tokenizer's if not given")
    choice("sample", False, "compile a sampling step instead of a training step")
    choice("json", False, "end with one line of JSON")
    given = arguments.parse_config(plan, values, argv)
    if given is None:
        return
    if not given["topology"]:
        raise flags.IllegalFlagValueError("--topology=NAME must be given, such as v5e:4x4 or h100:8")
    as_json = given.pop("json")
    from sedd_jax.performance import plan as program

    result = program.plan(**given)
    print(program.table(result))
    if as_json:
        print(json.dumps(result))


def doctor(argv: list[str]) -> int:
    """Examine this machine: what it has, what a config gets, whether its numbers are right, what to change.

    sedd doctor [--config=FILE] [--config.a.b=value ...] [--json]
    """
    from sedd_jax.performance import inventory

    inventory.check_imports()
    values = flags.FlagValues()
    _, number, choice = arguments.definers(values)
    number("vocab_size", None, "tokens without the mask; the tokenizer's if not given", 1)
    choice("json", False, "end with one line of JSON")
    given = arguments.parse_config(doctor, values, argv)
    if given is None:
        return 0
    as_json = given.pop("json")
    from sedd_jax.performance import doctor as program

    result = program.examine(**given)
    print(program.table(result))
    if as_json:
        print(json.dumps(result))
    return 0 if result["trains"] else 1


_TAKE_CONFIGS = ("train", "bench", "plan", "doctor")
_TAKE_SAMPLING = ("eval", "sample", "tune-grid")
COMMANDS: dict[str, arguments.Command] = {
    "prepare": prepare,
    "train": train,
    "eval": evaluate,
    "runs": run_list.runs,
    "sample": sample,
    "tune-grid": tune_grid,
    "serve": serve,
    "convert": convert,
    "push": push.push,
    "bench": bench,
    "plan": plan,
    "doctor": doctor,
}


def _spelled(command: str, field: str) -> str:
    """The flag of a command that sets an input; a field of the config keeps its name if no flag sets it."""
    if not field.startswith("config.") or command in _TAKE_CONFIGS:
        return f"--{field}"
    setting = field.removeprefix("config.sampling.")
    return f"--{setting}" if "." not in setting and command in _TAKE_SAMPLING else field


def _fail(command: str, message: str, status: int) -> int:
    output.say(f"{command}: {message}")
    return status
