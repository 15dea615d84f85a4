"""The command: what it refuses, real tables at small shapes, and a program compiled for a TPU that is not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from launch import cli
from tools import bench, bench_conv

ROOT = Path(__file__).parents[2]


def launch(*argv: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.bench", *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment)


@pytest.fixture(autouse=True)
def fresh_flags():
    """Forget what other tests of this process have parsed."""


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--what=dense,foo"], ["--what is 'foo'", "dense", "save", "all"]),
        (["--lengths=512,0"], ["--lengths is 512,0", "whole numbers"]),
        (["--mb=x"], ["--mb is x"]),
        (["--sizes=huge"], ["--sizes has 'huge'", "124m"]),
        (["--backend=npu"], ["--backend is 'npu'", "cpu, gpu, tpu"]),
        (["--dtype=int8"], ["--dtype is 'int8'", "float32, bfloat16"]),
        (["--only=("], ["--only is '('", "regular expression"]),
        (["--backend=cpu", "--compile_only=v5e:2x2"], ["--backend", "--compile_only", "one of them"]),
        (["--compile_only=v5e:3x3"], ["--compile_only is 'v5e:3x3'", "2x2"]),
        (["--compile_only=h100:8"], ["--compile_only is 'h100:8'", "v5e:2x2"]),
        (["--wat=dense"], ["no flag --wat", "--what"]),
    ],
)
def test_mistakes_are_one_sentence(argv, parts, capsys):
    assert cli.run(bench.main, bench.FLAGS, bench.__doc__, argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and all(part in err for part in parts), err


@pytest.fixture(autouse=True)
def as_they_were():
    """Flags keep what a test gave them."""
    yield


def test_help_names_every_table(capsys):
    assert cli.run(bench.main, bench.FLAGS, bench.__doc__, ["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"--what={name}" in out for name in [*bench.TABLES, *bench.LINES])


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_a_backend_that_is_not_here():
    done = launch("--what=dense", "--backend=gpu")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert "--backend is gpu" in done.stderr and "no such device" in done.stderr


@pytest.mark.slow
def test_real_tables(monkeypatch, capsys):
    """Of each group our first row and the baseline, all forward and backward, as JSON."""
    monkeypatch.setattr(bench_conv, "STAGES", ((4, 8),))
    small = ["--rows=16", "--width=8", "--hidden=32", "--batch=1", "--lengths=64", "--heads=2", "--rounds=1"]
    model = [f"--config.model.{k}" for k in ("layers=1", "width=16", "heads=2", "head=tied")] + ["--context=16"]
    only = "--only=^YatNMN plain|^YatConv2D plain|plain, Aether blockwise|Taylor|AetherGPT"
    cli.parse(bench.FLAGS, ["--what=all", "--json", only, *small, *model])
    bench.main(bench.FLAGS)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    tables: dict[str, list[dict]] = {}
    for row in rows:
        tables.setdefault(row["table"].partition(":")[0], []).append(row)
    assert {name: len(its) for name, its in tables.items()} == {
        "dense": 2,
        "conv": 2,
        "attention": 2,
        "linear attention": 2,
        "step": 2,
    }
    for row in rows:
        assert row["ms"] > 0 and row["ratio"] > 0 and row["saved_bytes"] >= row["beside_bytes"] > 0
        assert row["flops"] > 0 and row["temp_bytes"] >= 0
        assert row["jax"] == jax.__version__ and row["device"] == "cpu" and row["cores"] >= 1 and row["date"]
    assert all(its[0]["ratio"] == 1.0 for its in tables.values())
    assert all(row["saved_bytes"] > row["beside_bytes"] for row in tables["dense"] + tables["conv"])  # weights are kept
    assert [row["name"] for row in tables["step"]] == ["GPT-2", "AetherGPT"]
    assert all(row["tokens_per_second"] == pytest.approx(16e3 / row["ms"]) for row in tables["step"])


def test_cycles_of_a_tpu_that_is_not_here():
    pytest.importorskip("libtpu")
    shape = ["--rows=256", "--width=128", "--hidden=256"]
    done = launch("--what=dense", "--compile_only=v5e:2x2", "--json", "--only=products", *shape)
    assert done.returncode == 0, done.stderr
    usual, products = (json.loads(line) for line in done.stdout.splitlines())
    assert products["flops"] == usual["flops"] == 6 * 2 * 256 * 128 * 256
    assert 0 < products["cycles"] < usual["cycles"] and products["ratio"] < usual["ratio"] == 1.0
    assert products["hbm_bytes"] > 0 and "ms" not in products
    assert products["device"] == "TPU v5 lite" and products["compile_only"] == "v5e:2x2"
