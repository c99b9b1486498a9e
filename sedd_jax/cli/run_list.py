"""`sedd runs`: runs side by side."""

import json

from absl import flags

from sedd_jax.cli import arguments


def runs(argv: list[str]) -> None:
    """List runs with step, bound and speed, and only the fields of their configs that differ.

    sedd runs RUN... | sedd runs DIR [--json]
    """
    values = flags.FlagValues()
    _, _, choice = arguments.definers(values)
    choice("json", False, "end with one line of JSON")
    if arguments.asks_for_help(argv):
        arguments.print_help(runs, values)
        return
    named = [argument for argument in argv if not argument.startswith("-")]
    given = arguments.parse(values, [argument for argument in argv if argument.startswith("-")])
    if not named:
        raise flags.IllegalFlagValueError("give run directories, or a directory that holds some")
    from sedd_jax import comparison
    from sedd_jax.evaluation import tables
    from sedd_jax.runtime import storage

    result = comparison.compare(comparison.find([storage.directory(name) for name in named]))
    for columns, rows in (comparison.overview(result), comparison.differences(result)):
        if rows:
            print(tables.Table(head=[], columns=columns, rows=rows, notes=[""]))
    if len(result["runs"]) > 1 and not result["differences"]:
        print("their configs are equal")
    if given["json"]:
        print(json.dumps(result))
