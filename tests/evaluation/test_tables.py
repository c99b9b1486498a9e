"""Tables line up in a terminal, and on a page nothing in them is markup."""

from sedd_jax.evaluation import tables

TABLE = tables.Table(
    head=["of a & b"],
    columns=("", "x", "a long title"),
    rows=[("first", "1.0", "2"), ("b", "10.0", "<3")],
    notes=["so"],
)


def test_columns_line_up():
    assert str(TABLE).splitlines() == [
        "of a & b",
        "           x   a long title",
        "first    1.0              2",
        "b       10.0             <3",
        "so",
    ]


def test_a_page_shows_every_cell_as_it_is():
    page = TABLE.as_html()
    assert "<td>&lt;3</td>" in page
    assert '<p class="head">of a &amp; b</p>' in page
    assert page.count("<tr>") == 3


def test_a_figure_has_an_error_where_there_is_one():
    assert tables.estimate(1.23456, 0.01) == "1.235 ± 0.010"
    assert tables.estimate(1.23456, None, 1) == "1.2"
