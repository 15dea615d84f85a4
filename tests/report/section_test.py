"""Cells, tables and coloured texts."""

import math

import pytest

from aether.report.section import Passage, Table, shown


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "–"),
        (True, "yes"),
        (1234567, "1,234,567"),
        (0.0, "0"),
        (0.12345678, "0.1235"),
        (-12.5, "−12.5"),
        (54321.7, "54,322"),
        (1.25e-7, "1.25e−07"),
        (3.2e9, "3.2e+09"),
        (math.nan, "not a number"),
        (-math.inf, "−∞"),
        ("words", "words"),
    ],
)
def test_cells_are_written_for_readers(value, text):
    assert shown(value) == text


def test_a_table_of_records_has_every_key_once_and_knows_its_numbers():
    table = Table.of([{"a": 1, "b": "x"}, {"b": "y", "c": 0.5}, {"a": None, "c": None}])
    assert table.columns == ("a", "b", "c")
    assert table.rows == ((1, "x", None), (None, "y", 0.5), (None, None, None))
    assert table.numeric == {0, 2}
    assert table.record()["rows"][1] == {"a": None, "b": "y", "c": 0.5}


def test_shares_are_coloured_by_the_largest():
    passage = Passage((("a", 0.5), ("b", -1.0), ("c", 0.0)))
    assert passage.colours() == [("a", 50, "for"), ("b", 100, "against"), ("c", 0, "against")]
    assert Passage((("a", 0.0),)).colours() == [("a", 0, "against")]
