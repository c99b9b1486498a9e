"""`sedd eval` measures one thing at a time, and refuses flags of another."""

import pytest
from absl import flags

from sedd_jax.cli import eval_flags
from sedd_jax.cli import main as cli


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--generate --code", "--generate goes without --code"),
        ("--suite=zero_shot --report", "--suite goes without --report"),
        ("--judge=runs/ar", "--judge has no meaning: it is of generate, curve, frontier, infill"),
        ("--code --judge=runs/ar", "--judge has no meaning with --code: it is of generate, curve, frontier, infill"),
        ("--suite=humaneval --split=test", "--split has no meaning with --suite=humaneval: it is of likelihood"),
        ("--generate", "--judge=RUN must be given with --generate"),
        ("--curve=steps:1", "--judge=RUN must be given with --curve"),
        ("--suite=humaneval", "--problems=FILE must be given with --suite=humaneval"),
        ("--suite=mine", "should be one of"),
    ],
)
def test_flags_that_do_not_belong_together_are_refused(arguments, message, capsys):
    assert cli.main(["eval", "--workdir=runs/none", "--num_processes=1", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_every_flag_is_of_something_that_can_be_asked_for():
    values = flags.FlagValues()
    eval_flags.define(values)
    asked = {"suite", "conditional", "generate", "curve", "frontier", "infill", "code", "report"}
    everywhere = {"workdir", "step", "json", "coordinator_address", "num_processes", "process_id"}
    owned = {name for mode in eval_flags.modes().values() for name in mode.flags}
    assert set(values) == asked | everywhere | owned
