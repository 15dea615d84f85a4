"""The table of lazy evaluation: whole at k = all, and errors that grow below their bounds as k falls."""

import sys

import pytest

from tools import bench_lazy


@pytest.mark.slow
def test_the_table_at_a_small_shape(monkeypatch, capsys):
    monkeypatch.setattr(bench_lazy, "SHARES", (1.0, 0.1))
    monkeypatch.setitem(sys.modules, "faiss", None)  # as if it were not installed
    whole, tenth = bench_lazy.rows(12, 5, 40, 1)
    assert "no cells" in capsys.readouterr().err and "cells" not in whole
    assert (whole["k"], tenth["k"], tenth["share"], tenth["hidden"]) == (40, 4, 0.1, 40)
    assert whole["error"] == whole["bound"] == 0 < tenth["error"] <= tenth["bound"]
    assert whole["exact"] > 0 and tenth["exact"] > 0


def test_times_are_by_the_first_call():
    def slow():
        return sum(range(200_000))

    one, many = bench_lazy.timed([lambda: 0, slow], 3)
    assert one == 1.0 and many > 10
