"""`sedd push`: a model for the Hugging Face Hub, shown before it is sent."""

import sys

from absl import flags

from sedd_jax.cli import arguments


def push(argv: list[str]) -> int:
    """Upload a run or a converted checkpoint to the Hugging Face Hub, after showing every file.

    sedd push --from=RUN|DIR --to=OWNER/NAME [--public] [--yes]
    """
    values = flags.FlagValues()
    text, _, choice = arguments.definers(values)
    text("from", None, "run directory, which is converted first, or a directory that `sedd convert` wrote")
    text("to", None, "repository on the Hub, OWNER/NAME; made if there is none")
    choice("public", False, "upload to a public repository; private if not given")
    choice("yes", False, "upload what is listed without asking")
    if arguments.asks_for_help(argv):
        arguments.print_help(push, values)
        return 0
    given = arguments.parse(values, argv, "from")
    if not given["to"]:
        raise flags.IllegalFlagValueError("--to=OWNER/NAME must be given")
    from sedd_jax.conversion import hub_uploads as program
    from sedd_jax.runtime import errors

    program.check_name(given["to"])
    with program.written(given["from"]) as (directory, converted):
        upload = program.plan(directory, given["to"], is_public=given["public"])
        print(*filter(None, [converted, program.describe(upload)]), sep="\n", flush=True)
        if not given["yes"] and not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise errors.UserError(
                "nothing was uploaded, since there is no terminal to ask at",
                remedy=f"give {errors.name('yes')} to upload what is listed",
            )
        print(program.look(upload), flush=True)
        if not given["yes"] and not _agrees(f"upload these {len(upload.files)} files? [y/N] "):
            print("nothing was uploaded")
            return 1
        print(f"uploaded: {program.send(upload)}")
    return 0


def _agrees(question: str) -> bool:
    print(question, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
