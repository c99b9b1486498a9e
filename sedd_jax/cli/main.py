"""The command line, `sedd COMMAND`. Results go to stdout, everything else to stderr."""

import functools
import json
import logging as python_logging
import pathlib
import sys
import traceback

from absl import flags, logging

from sedd_jax.cli import arguments
from sedd_jax.runtime import errors, hosts

TRY_AGAIN = 75  # EX_TEMPFAIL: launchers start a run again that ends with it.
PACKAGE = pathlib.Path(__file__).parent.parent


def run() -> None:
    """Entry point of the console script."""
    hosts.use_huge_pages()
    hosts.keep_compiled_programs()
    # What fails in the threads of libraries is told once, by the line of the command that fails.
    sys.unraisablehook = lambda _: None
    python_logging.getLogger("asyncio").setLevel(python_logging.CRITICAL)
    sys.exit(main(sys.argv[1:]))


def main(argv: list[str]) -> int:
    """Runs one command and returns its exit status: 0, 1 for a failure, 2 for wrong arguments, 75 for a stopped run."""
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(usage())
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        return _fail("sedd", f"unknown command {name!r}: choose one of {', '.join(COMMANDS)}", 2)
    logging.set_verbosity(logging.FATAL)
    logging.use_absl_handler()
    try:
        return COMMANDS[name](rest) or 0
    except flags.Error as error:
        return _fail(f"sedd {name}", f"{error}; see `sedd {name} --help`", 2)
    except errors.UserError as error:
        return _fail(f"sedd {name}", error.worded(functools.partial(_spelled, name)), 1)
    except (ValueError, OSError, ImportError) as error:
        # Ours say what is wrong and what to do; one from deeper down is a bug and keeps its traceback.
        if not _raised_here(error):
            raise
        return _fail(f"sedd {name}", _one_line(error), 1)
    except KeyboardInterrupt:
        has = lambda flag: any(argument.startswith(flag) for argument in rest)
        goes_on = name == "eval" or (name == "train" and not has("--step")) or has("--prompts")
        what = ": the same command goes on from what is finished" if goes_on else ""
        return _fail(f"sedd {name}", f"interrupted{what}", 130)


def usage() -> str:
    """What `sedd --help` prints."""
    lines = [f"  {name:<10}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["sedd: score entropy discrete diffusion", "", *lines, "", "`sedd COMMAND --help` lists a command's flags."]
    )


def train(argv: list[str]) -> int:
    """Train on text; the same command resumes.

    sedd train --config=configs/quickstart.py --workdir=runs/quickstart [--config.a.b=value ...]
    """
    values = flags.FlagValues()
    flags.DEFINE_string(
        "workdir", None, "run directory, made if missing, resumed if it holds a run", flag_values=values
    )
    flags.DEFINE_integer(
        "step", None, "checkpoint to go on from, newer ones removed; else the newest", flag_values=values
    )
    flags.DEFINE_bool("json", False, "end with one line of JSON", flag_values=values)
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
    # With --step it would begin there again, and lose what it has done.
    return TRY_AGAIN if given["step"] is None else 1


def prepare(argv: list[str]) -> None:
    """Tokenize a corpus once, for any number of runs, or describe one that was.

    sedd prepare --data=text:books/*.txt --tokenizer=gpt2 --out=data/books | sedd prepare --describe=data/books
    """
    values = flags.FlagValues()
    flags.DEFINE_string("data", None, "source of text, as KIND:ARGUMENT or a corpus' name", flag_values=values)
    flags.DEFINE_string("tokenizer", None, "gpt2, characters, bytes, sentencepiece:N, ...", flag_values=values)
    flags.DEFINE_string("out", None, "directory to make, local or gs://", flag_values=values)
    flags.DEFINE_integer("num_workers", None, "processes; one for each core if not given", flag_values=values)
    flags.DEFINE_string("describe", None, "directory of prepared text to describe instead", flag_values=values)
    flags.DEFINE_bool("json", False, "end with one line of JSON", flag_values=values)
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
                    f"--{name} must be given, as --data, --tokenizer and --out, or --describe"
                )
        directory = storage.directory(given["out"])
        program.prepare(given["data"], given["tokenizer"], directory, num_workers=given["num_workers"])
    else:
        if any(wanted.values()):
            raise flags.IllegalFlagValueError("--describe goes without --data, --tokenizer and --out")
        directory = storage.directory(given["describe"])
    description = program.describe(directory)
    print(program.table(description))
    if given["json"]:
        print(json.dumps(description))


def evaluate(argv: list[str]) -> None:
    """Bound the likelihood of text, measure what a run generates, or report both.

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
    result, shown = eval_flags.measure(values, given)
    print(shown)
    if given["json"]:
        print(json.dumps(result))


def sample(argv: list[str]) -> None:
    """Draw text from a run, from nothing or around given text.

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
    """Find the times at which a run's steps lose least likelihood, for --grid=tuned.

    sedd tune-grid --workdir=RUN --num_steps=16
    """
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "run directory", flag_values=values)
    flags.DEFINE_integer("num_steps", 16, "reverse steps that it is for", flag_values=values)
    flags.DEFINE_integer("step", None, "checkpoint; the newest if not given", flag_values=values)
    flags.DEFINE_integer("num_sequences", 128, "held-out sequences, half to tune, half to judge", 2, flag_values=values)
    flags.DEFINE_integer("batch_size", 32, "sequences at once", 1, flag_values=values)
    flags.DEFINE_integer("seed", 0, "of sequences and noise", 0, 2**32 - 1, flag_values=values)
    flags.DEFINE_bool("json", False, "end with one line of JSON", flag_values=values)
    arguments.define_processes(values)
    if arguments.asks_for_help(argv):
        arguments.print_help(tune_grid, values)
        return
    given = arguments.parse(values, argv, "workdir")
    arguments.join_processes(given)
    as_json, workdir = given.pop("json"), given.pop("workdir")
    from sedd_jax.evaluation import tune_grid as program

    result = program.tune(workdir, **given)
    print(program.table(result))
    if as_json:
        print(json.dumps(result))


def serve(argv: list[str]) -> int:
    """Open a local page to play with a run: text with gaps, samplers side by side, step by step.

    sedd serve --workdir=RUN [--step=N] [--host=127.0.0.1] [--port=8000] [--open]
    """
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "run directory", flag_values=values)
    flags.DEFINE_integer("step", None, "checkpoint; the newest if not given", flag_values=values)
    flags.DEFINE_string("host", "127.0.0.1", "where to listen; 0.0.0.0 lets other machines in", flag_values=values)
    flags.DEFINE_integer("port", 8000, "the port, 0 for any that is free", flag_values=values)
    flags.DEFINE_bool("open", False, "open the page in the browser", flag_values=values)
    if arguments.asks_for_help(argv):
        arguments.print_help(serve, values)
        return 0
    given = arguments.parse(values, argv, "workdir")
    from sedd_jax.serving import app as program

    try:
        program.serve(given["workdir"], step=given["step"], host=given["host"], port=given["port"], opens=given["open"])
    except KeyboardInterrupt:
        return _fail("sedd serve", "stopped", 130)
    return 0


def convert(argv: list[str]) -> None:
    """Carry a checkpoint between run directories, PyTorch's layouts, the Hub and StableHLO.

    sedd convert --from=RUN|DIR|FILE.ckpt|OWNER/NAME --to=DIR [--to_format=torch|jax|stablehlo] [--weights=raw]
    """
    values = flags.FlagValues()
    flags.DEFINE_string(
        "from", None, "run, directory or file of PyTorch's, or OWNER/NAME of the Hub", flag_values=values
    )
    flags.DEFINE_string("to", None, "directory to write", flag_values=values)
    flags.DEFINE_string(
        "to_format", None, "torch, jax (a run) or stablehlo; the other side if not given", flag_values=values
    )
    flags.DEFINE_string("weights", "ema", "ema, or raw (not averaged)", flag_values=values)
    flags.DEFINE_string("dtype", "float32", "of torch's tensors: float32, bfloat16 or float16", flag_values=values)
    flags.DEFINE_integer("step", None, "checkpoint of a run; the newest if not given", flag_values=values)
    flags.DEFINE_string(
        "tokenizer", "", "for a source without one: gpt2:FILE, text8, ...; by default from the size", flag_values=values
    )
    flags.DEFINE_bool(
        "verify", None, "compare with the network in PyTorch; if not given, where torch is", flag_values=values
    )
    flags.DEFINE_bool("json", False, "end with one line of JSON", flag_values=values)
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
    """Time a training step and a sampling step of a config, alone or beside the published program.

    sedd bench --config=configs/owt_small.py [--config.training.batch_size=1 ...] [--reference=DIR]
    """
    values = flags.FlagValues()
    flags.DEFINE_integer(
        "vocab_size", None, "tokens, the mask left out; the tokenizer's if not given", flag_values=values
    )
    flags.DEFINE_integer("repeats", 5, "turns of each program", flag_values=values)
    flags.DEFINE_string(
        "reference", None, "a checkout of the published PyTorch program, timed by turns with ours", flag_values=values
    )
    flags.DEFINE_string(
        "reference_python", sys.executable, "the interpreter with torch that runs it", flag_values=values
    )
    flags.DEFINE_bool("json", False, "end with one line of JSON", flag_values=values)
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
    """Compile a config's step for a TPU slice that is not here: does it fit, what does it cost.

    sedd plan --config=configs/owt_small.py --topology=v5e:4x4 [--sample] [--config.a.b=value ...]
    """
    hosts.compile_for_others()
    values = flags.FlagValues()
    flags.DEFINE_string("topology", None, "generation and chips along each axis, such as v5e:4x4", flag_values=values)
    flags.DEFINE_integer("num_slices", 1, "slices of that shape", flag_values=values)
    flags.DEFINE_integer(
        "vocab_size", None, "tokens, the mask left out; the tokenizer's if not given", flag_values=values
    )
    flags.DEFINE_bool("sample", False, "a sampling step instead of a training step", flag_values=values)
    flags.DEFINE_bool("json", False, "end with one line of JSON", flag_values=values)
    given = arguments.parse_config(plan, values, argv)
    if given is None:
        return
    if not given["topology"]:
        raise flags.IllegalFlagValueError("--topology=NAME must be given, such as v5e:4x4")
    as_json = given.pop("json")
    from sedd_jax.performance import plan as program

    result = program.plan(**given)
    print(program.table(result))
    if as_json:
        print(json.dumps(result))


_TAKE_CONFIGS = ("train", "bench", "plan")
COMMANDS: dict[str, arguments.Command] = {
    "prepare": prepare,
    "train": train,
    "eval": evaluate,
    "sample": sample,
    "tune-grid": tune_grid,
    "serve": serve,
    "convert": convert,
    "bench": bench,
    "plan": plan,
}


def _spelled(command: str, field: str) -> str:
    """An input as a command takes it; a field of a run's config stays what it is where no flag sets it."""
    if not field.startswith("config.") or command in _TAKE_CONFIGS:
        return f"--{field}"
    setting = field.removeprefix("config.sampling.")
    return field if "." in setting else f"--{setting}"


def _raised_here(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and PACKAGE in pathlib.Path(frames[-1].filename).parents


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())


def _fail(command: str, message: str, status: int) -> int:
    print(f"{command}: {message}", file=sys.stderr)
    return status
