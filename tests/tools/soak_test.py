"""The soak: what it calls equal, what it breaks, and a short one for real."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from aether.checkpoint import Checkpoints
from aether.config import CheckpointConfig
from aether.errors import StorageError
from tools import soak, soak_faults
from tools.soak_run import Broken, Training


def run(folder, losses, value=1.0):
    """Make the folder of a run of as many steps as there are losses."""
    folder.mkdir()
    lines = [dict(step=i, split="train", loss=loss, mfu=float(i)) for i, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    c = Checkpoints(str(folder / "checkpoints"), CheckpointConfig())
    c.save(len(losses), {"params": {"w": jnp.full(4, value)}}, meta={})
    c.close()
    return soak.result(folder)


def test_equal_runs_are_equal_and_times_do_not_matter(tmp_path):
    one, other = run(tmp_path / "a", [3.0, 2.0]), run(tmp_path / "b", [3.0, 2.0])
    other[0][1, "train"].pop("mfu", None)
    assert soak.differences(one, other, 0.0, "b") == []
    assert one[1]["params/w"].tolist() == [1.0] * 4


@pytest.mark.parametrize("close", [0.0, 1e-5])
def test_what_differs_is_found(tmp_path, close):
    one = run(tmp_path / "a", [3.0, 2.0])
    assert "at (2, 'train')" in soak.differences(one, run(tmp_path / "b", [3.0, 2.1]), close, "b")[0]
    assert "metrics of [(2, 'train')]" in soak.differences(one, run(tmp_path / "c", [3.0]), close, "c")[0]
    found = soak.differences(
        one, run(tmp_path / "d", [3.0, 2.0], value=float(np.nextafter(np.float32(1), 2))), close, ""
    )
    assert bool(found) == (close == 0)
    assert bool(soak.differences(one, run(tmp_path / "e", [3.0, 2.0 + 1e-6]), close, "")) == (close == 0)


@pytest.mark.parametrize("steps", [[1, 2, 2], [1, 3], [2, 1]])
def test_a_step_told_twice_or_never_is_a_loss(tmp_path, steps):
    run(tmp_path / "a", [3.0, 2.0, 1.0][: len(set(steps)) + (3 in steps)])
    lines = [dict(step=step, split="train", loss=1.0) for step in steps]
    (tmp_path / "a" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(Broken, match="not those of steps 1 to"):
        soak.result(tmp_path / "a")


def test_every_kind_of_fault_comes_as_often_as_the_others():
    drawn = [kind for kind, far in soak.plan(list(soak.CONSTANT), 15, random.Random(0)) if far > 0]
    assert sorted(drawn) == sorted(list(soak.CONSTANT) * 3) and drawn != sorted(drawn)


@pytest.mark.parametrize("seed", range(6))
def test_a_spoilt_checkpoint_is_passed_over(tmp_path, seed):
    c = Checkpoints(str(tmp_path), CheckpointConfig(), log=lambda line: None)
    for step in (1, 2):
        c.save(step, {"w": jnp.full(100, step)}, meta={})
    c.close()
    words = soak_faults.spoil(tmp_path / "2", random.Random(seed))
    assert c.restore({"w": jnp.zeros(100, int)})[2] == 1, words
    with pytest.raises((StorageError, ValueError)):
        c.restore({"w": jnp.zeros(100, int)}, 2)


@pytest.mark.filterwarnings(
    "ignore::RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # JAX, of forks
def test_a_launcher_that_ends_wrongly_is_reported(tmp_path):
    missing = Training(tmp_path / "run", tmp_path / "none.py", 10, tmp_path / "log", dict(os.environ))
    missing.start(1)
    assert missing.wait() == 2 and "there is no such file" in missing.said(3)
    with pytest.raises(Broken, match="exit code 2"):
        soak_faults.Faults(missing, None, random.Random(0))("count", 2)
    missing.kill()


@pytest.mark.slow
def test_a_short_soak(tmp_path):
    command = [sys.executable, "-m", "tools.soak", "--minutes=1", "--seed=1", f"--out={tmp_path}"]
    process = subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        out = process.communicate(timeout=500)[0]
    finally:
        process.terminate()  # it ends what it has started
        process.wait(30)
    assert process.returncode == 0, out
    assert re.search(r"\d+ faults, and nothing is lost", out) and str(tmp_path) not in Path("/proc/mounts").read_text()
