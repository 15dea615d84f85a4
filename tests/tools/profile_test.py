"""Sums and tables of made-up operations, and the trace of a real step."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aether.errors import AetherError
from launch import cli
from tools import profile
from tools.profile import Operation, report, summed

ROOT = Path(__file__).parents[2]
NAMES = {
    "dot.1": "jit(step)/jvp(blocks)/while/body/closed_call/attention/dot_general",
    "dot.2": "jit(step)/transpose(jvp(blocks))/while/body/closed_call/mlp/transpose(mlp)/dot_general",
    "copy.3": "",
}


@pytest.mark.parametrize(
    ("op_name", "scope", "backward"),
    [
        (NAMES["dot.1"], "attention", False),
        (NAMES["dot.2"], "mlp", True),
        ("jit(step)/jvp(blocks)/while/body/dynamic_slice", "blocks", False),
        ("jit(step)/transpose(jvp(head))/while/body/mul", "head", True),
        ("jit(step)/jvp(embed)/jit(_take)/gather", "embed", False),
        ("jit(step)/transpose(jvp(stage2))/while/body/conv_general_dilated", "stage2", True),
        ("jit(step)/optimizer/transpose", "optimizer", False),
        ("jit(step)/overhead/add", "other", False),
        ("", "other", False),
    ],
)
def test_scopes(op_name, scope, backward):
    operation = Operation("x", op_name)
    assert (operation.scope, operation.backward) == (scope, backward)


def test_sums_leave_out_what_is_no_operation_of_the_step():
    found = [("dot.1", 1.0), ("while.9", 7.0), ("dot.2", 4.0), ("dot.1", 2.0), ("copy.3", 0.5)]
    operations = summed(found, NAMES)
    assert [(o.name, o.runs, o.ms) for o in operations] == [("dot.2", 1, 4.0), ("dot.1", 2, 3.0), ("copy.3", 1, 0.5)]


def test_report():
    operations = summed([("dot.1", 3.0), ("dot.2", 4.0), ("copy.3", 1.0), ("dot.1", 2.0)], NAMES)
    lines = report(operations, steps=2, top=2, ms=6.5).splitlines()
    assert lines[0] == "a step: 6.50 ms; its operations together: 5.00 ms, of 2 steps traced"
    assert lines[4:7] == [
        "| attention | 2.50 | 0.00 | 50.0 % |",
        "| mlp | 0.00 | 2.00 | 40.0 % |",
        "| other | 0.50 | 0.00 | 10.0 % |",
    ]
    assert lines[-2:] == [
        "| dot.1 | 2.500 | 50.0 % | 1 | attention | attention/dot_general |",
        "| dot.2 | 2.000 | 40.0 % | 0.5 | mlp, backward | transpose(mlp)/dot_general |",
    ]


def test_a_trace_without_operations_says_so(tmp_path):
    assert list(profile.events(str(tmp_path))) == []
    with pytest.raises(AetherError, match="no operations of the step on cpu"):
        profile.checked([], str(tmp_path), "cpu")


@pytest.mark.parametrize(
    ("argv", "part"), [([], "--config is missing"), (["--steps=0"], "--steps is '0'"), (["--topp=3"], "--top?")]
)
def test_mistakes_are_one_sentence(argv, part, capsys):
    assert cli.run(profile.main, profile.FLAGS, profile.__doc__, argv) == 2
    assert part in (err := capsys.readouterr().err) and err.count("\n") == 1


@pytest.mark.slow
def test_a_real_step(tmp_path):
    small = [f"--config.{k}" for k in ("model.layers=2", "model.width=32", "model.heads=2", "data.context=32")]
    command = [sys.executable, "-m", "tools.profile", "--config=configs/quickstart.py", "--steps=2", "--top=5", *small]
    environment = os.environ | dict(JAX_PLATFORMS="cpu")
    done = subprocess.run(
        [*command, f"--out={tmp_path}"], cwd=ROOT, capture_output=True, text=True, env=environment
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    scopes, operations = done.stdout.split("| operation")
    rows = {line.split("|")[1].strip(): line.split("|")[2:5] for line in scopes.splitlines()[4:] if "|" in line}
    assert {"embed", "attention", "mlp", "head", "optimizer"} <= set(rows)
    for scope in ("attention", "mlp"):
        assert float(rows[scope][0]) > 0 and float(rows[scope][1]) > 0  # forward and backward
    assert operations.count("\n| ") == 6 and list(tmp_path.glob("**/*.xplane.pb"))  # a line of dashes and five rows
