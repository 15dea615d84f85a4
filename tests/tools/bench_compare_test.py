"""What is counted, what is run and how ratios are taken, on functions whose numbers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tools import bench_compare
from tools.bench_compare import Contender, Program, measured, of_function, ratios, saved_bytes
from tools.bench_table import table
from tools.bench_where import Where, free_memory, here

X, W = jax.ShapeDtypeStruct((6, 8), "float32"), jax.ShapeDtypeStruct((8, 4), "float32")


@pytest.fixture
def where():
    return Where(jax.devices("cpu")[0], None, 2**30)


@pytest.mark.parametrize(
    ("f", "args", "saved", "beside"),
    [
        (lambda w, x: x @ w, (W, X), 4 * (48 + 32), 0),  # both operands
        (lambda w, x: jnp.exp(x @ w), (W, X), 4 * (48 + 32 + 24), 4 * 24),  # and y
        (lambda x: x * x, (X,), 4 * 48, 0),  # one array, kept twice
        (lambda x: jnp.sin(x) * jnp.sin(x), (X,), None, 2 * 4 * 2 * 48),  # sines and cosines of two calls
        (lambda w, x: x.astype("bfloat16") @ w.astype("bfloat16"), (W, X), 2 * (48 + 32), 2 * (48 + 32)),
        (lambda x: x + 1, (X,), 0, 0),
    ],
)
def test_saved_bytes_are_those_of_the_residuals_once_each(f, args, saved, beside):
    assert saved_bytes(f, *args, given=False) == beside
    assert saved_bytes(f, *args) == (beside if saved is None else saved)


def test_ratios_are_medians_of_pairs():
    times = [[1.0, 2.0], [10.0, 30.0], [100.0, 150.0]]  # the medians' own quotient is 3
    assert ratios(times) == [1.0, 2.0]


def test_rows_of_a_product(where):
    def product(w, x):
        return x @ w

    contenders = [of_function("once", product, W, X), of_function("its sine", lambda w, x: jnp.sin(x @ w), W, X)]
    first, second = measured("products", contenders, where, 3)
    assert (first["table"], first["name"], first["ratio"]) == ("products", "once", 1.0)
    assert first["flops"] == second["flops"] == 3 * 2 * 6 * 8 * 4  # y and two gradients
    assert first["saved_bytes"] == 4 * (48 + 32) and second["saved_bytes"] == 4 * (48 + 32 + 24)
    assert first["argument_bytes"] == 4 * (48 + 32 + 24)
    assert first["memory_bytes"] >= first["argument_bytes"] + 4 * (48 + 32 + 24)
    assert first["ms"] > 0 and second["ms"] > 0 and second["ratio"] > 0


def fake(name, log, memory):
    """A contender that writes its name down when it is called."""
    compiled = jax.jit(lambda x: x).lower(jax.ShapeDtypeStruct((memory // 8,), "float32")).compile()
    return Contender(name, lambda where: Program(compiled, 0, 0, lambda: lambda: log.append(name)))


def test_contenders_take_turns_and_what_does_not_fit_is_listed(where, monkeypatch):
    log: list[str] = []
    monkeypatch.setattr(bench_compare, "SAMPLE", 0.0)  # no call is repeated
    monkeypatch.setattr(bench_compare, "LONG", 0.0)
    contenders = [fake("a", log, 64), fake("large", log, 2**31), fake("b", log, 64)]
    a, large, b = measured("t", contenders, where, 2)
    assert "".join(log) == "ab" * 4  # a first call, one to learn how long it takes, and two rounds
    assert large["ms"] is None and large["ratio"] is None and large["memory_bytes"] == 2**31
    assert large["note"] == "not run: needs 2.0 GiB, and the limit is 1.0"
    assert "note" not in a and a["ratio"] == 1.0 and b["ratio"] > 0


def test_without_the_first_there_are_times_but_no_ratios(where):
    log: list[str] = []
    large, b = measured("t", [fake("large", log, 2**31), fake("b", log, 64)], where, 1)
    assert large["ms"] is None and b["ms"] > 0 and b["ratio"] is None
    (alone,) = measured("t", [fake("large", log, 2**31)], where, 1)
    assert alone["ms"] is None and "not run" in alone["note"]


def test_inputs_are_random(where):
    seen = bench_compare.drawn((W, jax.ShapeDtypeStruct((9,), "float32")), (X,), X, jax.random.key(0))
    arrays = jax.tree.leaves(seen)
    assert [a.shape for a in arrays] == [(8, 4), (9,), (6, 8), (6, 8)]
    assert all(np.count_nonzero(a) == a.size for a in arrays)
    assert not np.array_equal(arrays[2], arrays[3]) and 0 < np.min(arrays[1]) and np.max(arrays[1]) < 1


def test_table_leaves_out_empty_columns():
    rows = [
        dict(table="t", name="one", ms=1.234, ratio=1.0, saved_bytes=2**20, flops=2e9, kernels={}),
        dict(table="t", name="two", ms=None, ratio=None, saved_bytes=None, flops=4e9, kernels={}, note="not run"),
    ]
    assert table(rows).splitlines() == [
        "",
        "**t**",
        "",
        "|  | ms | ratio | saved MiB | GFLOP of products | note |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| one | 1.23 | 1.00 | 1.0 | 2.00 | – |",
        "| two | – | – | – | 4.00 | not run |",
    ]


def test_memory_is_what_is_free_or_what_is_said():
    cpu = jax.devices("cpu")[0]
    assert 2**20 < free_memory(cpu) < 2**50
    assert here("", 0.5).memory == 2**29
    assert here("", 0).memory <= free_memory(cpu) * 1.1


def test_without_nmn_its_rows_are_left_out(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "nmn", None)
    assert bench_compare.nmn() is None
    assert "aether[parity]" in capsys.readouterr().err


def test_cycles_are_compared_only_where_they_are_whole(monkeypatch):
    """A kernel's cycles are nobody's, and a program that does not fit has none."""
    said = {
        "a": dict(cycles=200, memory_bytes=10, kernels={}),
        "kernel": dict(cycles=3, memory_bytes=10, kernels={"tpu_custom_call": 1}),
        "large": dict(memory_bytes=2**31),
        "b": dict(cycles=100, memory_bytes=10, kernels={}),
    }
    monkeypatch.setattr(bench_compare, "described", lambda contender, where: (dict(said[contender.name]), None))
    tpu = Where(jax.devices("cpu")[0], "v5e:1x1", 2**30)
    rows = measured("t", [Contender(name, None) for name in said], tpu, 1)
    assert [row["ratio"] for row in rows] == [1.0, None, None, 0.5]
    assert rows[2]["note"] == "does not fit: needs 2.0 GiB, and the limit is 1.0"
