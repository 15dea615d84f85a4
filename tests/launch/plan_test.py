"""The plan's main: what it hands over, what it prints, what it refuses, and that it runs as a process."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from launch import cli, plan

ROOT = Path(__file__).parents[2]

CONFIG = "--config=configs/quickstart.py"
IMAGES = "--config=configs/imagenet_resnet50.py"
TINY = ("--config.model.layers=2", "--config.model.width=32", "--config.model.heads=4")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(cli, "prepare_environment", lambda debug: None)


def run(*argv):
    return cli.run(plan.main, plan.FLAGS, plan.__doc__, [CONFIG, *argv])


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ((), "--topology is missing"),
        (("--topology=v5e:5x5",), "v5e comes as 1x1, 2x2"),
        (("--topology=v5e:4x4", "--scaling=16,4"), "write growing numbers of chips"),
        (("--topology=v5e", "--scaling=16,48"), "v5e comes with 1, 4, 8, 16, 32, 64, 128, 256 or a multiple of 256"),
        (("--topology=v7", "--scaling=16"), "begins with one of v4, v5e"),
        (("--topology=v5e:4x4", "--scaling=16", "--search"), "give one of them"),
        (("--topology=h100:128",), "at most 64"),
        (("--topology=v5e:4x4", "--batch=-1"), "--batch is '-1'"),
        (("--topology=v5e:4x4", IMAGES, "--context=64"), "--context is 64, but aether_resnet sees images"),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_compiled(argv, told, capsys):
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_images_need_their_classes(monkeypatch, capsys):
    monkeypatch.setattr("aether.plan.machine.prepare", lambda targets, debug: None)
    assert run(IMAGES, "--topology=v5e:1x1") == 2
    error = capsys.readouterr().err
    assert "image.size is 224 and model.classes 0" in error and error.count("\n") == 1


def test_it_plans_gpus_in_a_process_of_its_own(tmp_path):
    """The one flag that must be set before JAX starts, the number of CPU devices, is."""
    command = [
        sys.executable,
        "-m",
        "launch.plan",
        CONFIG,
        *TINY,
        "--topology=h100:4",
        "--config.mesh.fsdp=2",
        "--json",
    ]
    environment = os.environ | {"AETHER_CACHE": str(tmp_path)}
    done = subprocess.run(
        [*command, "--batch=8", "--context=64", "--config.model.dtype=float32"],
        **dict(capture_output=True, text=True, timeout=300, env=environment, cwd=Path(__file__).parents[2]),
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["batch_size"], said["context"], said["vocab"], said["chips"]) == (8, 64, 257, 4)
    assert said["fits"] is True and said["mesh"] == dict(data=2, fsdp=2, sequence=1, tensor=1)
    assert done.stderr == ""


def test_without_the_tpu_compiler_it_says_what_to_install():
    code = """
        import sys
        sys.modules["libtpu"] = None
        from launch import cli, plan
        sys.exit(cli.run(plan.main, plan.FLAGS, "", sys.argv[1:]))
    """
    words = ["--config=configs/quickstart.py", "--vocab=257", "--topology=v5e:2x2"]
    env = {k: v for k, v in os.environ.items() if k != "TPU_LIBRARY_PATH"}  # JAX sets it where it has found libtpu
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *words], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert (
        "--topology is v5e:2x2, whose compiler is not installed; pip install 'aether[plan]' brings it." in done.stderr
    )
