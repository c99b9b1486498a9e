import pickle

import pytest

from sedd_jax.runtime import errors


def test_every_reader_gets_names_as_it_gives_them():
    error = errors.UserError(
        f"goes without {errors.name('prefix')}",
        field="template",
        value="a b",
        remedy=f"leave {errors.name('prefix')} out",
    )
    assert str(error) == "template='a b' goes without prefix: leave prefix out"
    assert error.worded(lambda field: f"--{field}") == "--template='a b' goes without --prefix: leave --prefix out"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "is wrong"),
        ({"field": "config.data.length", "value": 0}, "config.data.length=0 is wrong"),
        ({"field": "judge", "value": ""}, "judge='' is wrong"),
        ({"field": "judge"}, "judge is wrong"),
        ({"place": "a.jsonl:3", "remedy": "mend it"}, "a.jsonl:3: is wrong: mend it"),
    ],
)
def test_parts_that_are_not_there_leave_no_trace(fields, message):
    assert str(errors.UserError("is wrong", **fields)) == message


def test_a_message_takes_one_line():
    assert "\n" not in str(errors.UserError("two\nlines", value="x\ny", field="data"))


def test_places_are_added_in_front():
    error = errors.UserError("is wrong", field="template", value="{x", remedy="mend it").at("3").at("a.jsonl")
    assert str(error) == "a.jsonl: 3: template={x is wrong: mend it"


def test_an_error_of_another_process_is_the_same():
    error = errors.UserError("is wrong", field="data", value="x", remedy="mend it", place="here")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is errors.UserError
    assert vars(again) == vars(error)


def test_it_is_a_value_error():
    with pytest.raises(ValueError, match="is wrong"):
        raise errors.UserError("is wrong")
