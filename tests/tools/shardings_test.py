"""The table of shardings: its numbers by hand, and what does not divide."""

import pytest

from launch import cli
from tools import shardings

CONFIG = "--config=configs/quickstart.py"
TINY = ("--config.model.layers=2", "--config.model.width=32", "--config.model.heads=4", "--config.mesh.data=1")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Undo what the main sets for the process."""
    for name in ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.setenv(name, "cpu")
    monkeypatch.setattr(cli, "prepare_environment", lambda debug: None)


def run(*argv, config=(CONFIG, *TINY)):
    return cli.run(shardings.main, shardings.FLAGS, shardings.__doc__, [*config, *argv])


def test_the_table_says_what_a_device_holds(capsys):
    assert run("--devices=8", "--config.mesh.fsdp=4", "--config.mesh.tensor=2", "--optimizer") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "8 devices: data=1, fsdp=4, sequence=1, tensor=2"
    row = next(line for line in lines if line.startswith("blocks/mlp/hidden/kernel")).split()
    assert row[1:3] == ["2x32x128", "float32"] and row[-1] == f"{2 * 8 * 64 * 4:,}"
    moments = [line for line in lines if line.endswith(f"{2 * 8 * 64 * 4:,}") and "mlp/hidden/kernel" in line]
    assert len(moments) == 3  # the parameter and Adam's two moments
    totals = [line for line in lines if "a device, of" in line]
    assert [line.partition(":")[0] for line in totals] == ["params", "opt_state"]


def test_what_batches_leave_behind_is_part_of_the_table(capsys):
    small = ("model.kind=resnet", "model.stages=1", "model.width=16", "model.classes=10", "image.size=8", "mesh.fsdp=4")
    config = ("--config=configs/digits.py", *(f"--config.{key}" for key in small))
    assert run("--devices=8", config=config) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("stem/norm/mean")).split()[-1] == f"{16 // 4 * 4}"
    totals = [line for line in lines if "a device, of" in line]
    norm = 2 * 4 * 16  # mean and variance; of three, the one between the convolutions lies along tensor
    assert totals[1] == f"extras: {norm // 4 + norm + norm // 4} B a device, of {3 * norm} B in all"


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (
            ("--devices=8", "--config.mesh.tensor=8", "--config.model.hidden=36"),
            "tensor=8 does not divide; 1, 2, 4 would",
        ),
        (("--devices=8", "--config.mesh.fsdp=3"), "make the product of the sizes 8"),
        ((), "Give one of --devices"),
        (("--devices=8", "--topology=v5e:2x2"), "Give one of --devices"),
        (("--topology=v5e:3x3",), "v5e comes as"),
    ],
)
def test_what_does_not_divide_is_told_in_a_sentence(argv, told, capsys):
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1, error
