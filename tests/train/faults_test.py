"""Faults of real runs of two processes: a signal to one, one that hangs in Python, one that is stopped dead."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from aether.testing import tiny_text
from tools import soak
from tools.soak_run import CONFIG, Training

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STEPS = 40
HANG = """
import os, sys, threading
from aether.train import loop
from launch import cli, train

whole = loop.train_batches


def hanging(*args, **kwargs):
    for number, batch in enumerate(whole(*args, **kwargs)):
        if number == 12 and os.environ["JAX_PROCESS_ID"] == "1":
            a_lock_that_nobody_frees()
        yield batch


def a_lock_that_nobody_frees():
    threading.Event().wait()


loop.train_batches = hanging
sys.exit(cli.run(train.main, train.FLAGS, "doc", several=True))
"""


@pytest.fixture
def config(tmp_path):
    text = str(tiny_text(tmp_path, 4000))
    path = tmp_path / "config.py"
    path.write_text(CONFIG.format(text=text, cache=str(tmp_path / "cache"), own=text, seed=0, every=10))
    return path


@pytest.fixture
def training(tmp_path, config):
    """A function: the run in a folder, ended with the test."""
    runs = []

    def make(name):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        runs.append(Training(tmp_path / name, config, STEPS, tmp_path / f"{name}.log", environment))
        return runs[-1]

    yield make
    for run in runs:
        run.kill()


@pytest.mark.filterwarnings(
    "ignore::RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # JAX, of forks
def test_a_signal_to_one_stops_both_at_the_same_step(training):
    whole = training("whole")
    whole.start(2)
    assert whole.finish() == 0, whole.said(20)

    run = training("stopped")
    run.start(2)
    assert run.passes(12), run.said(20)
    run.send(signal.SIGTERM, 1)
    assert run.wait() == 75, run.said(20)
    saved = run.saved()[-1]
    assert 12 <= saved < STEPS and saved == run.step()
    assert f"Stopped by SIGTERM and saved at step {saved} of {STEPS}" in run.said(20)
    run.start(2)
    assert run.finish() == 0, run.said(20)
    assert f"going on from step {saved} of" in run.log.read_text()
    assert soak.differences(soak.result(whole.folder), soak.result(run.folder), 0.0, "the stopped run") == []


@pytest.fixture
def two(tmp_path, config):
    """A function (program, *flags) -> two processes that train, started by hand; ended with the test."""
    started = []

    def start(*program, **faults):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        flags = [f"--config={config}", f"--workdir={tmp_path / 'run'}"]
        flags += [f"--config.faults.{name}={value}" for name, value in faults.items()]
        environment = {**os.environ, "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
        environment |= {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
        for index in "01":
            with (tmp_path / f"log{index}").open("w") as log:
                process = subprocess.Popen(
                    [sys.executable, *program, *flags],
                    env=environment | {"JAX_PROCESS_ID": index},
                    cwd=ROOT,
                    stdout=log,
                    stderr=log,
                )
            started.append(process)
        return started

    yield start
    for process in started:
        process.kill()
        process.wait()


def flight(tmp_path, process):
    """Wait for a process's record of a hang; return its head, its steps and its stacks."""
    found = []

    def there():
        found[:] = (tmp_path / "run").glob(f"flight/process-{process}-*-hang.stacks.txt")
        return bool(found)

    Training(tmp_path / "run", tmp_path, 0, tmp_path / "log0", {}).until(there, f"the flight of process {process}")
    head, *steps = map(json.loads, found[0].with_name(found[0].name[:-10] + "jsonl").read_text().splitlines())
    return head, steps, found[0].read_text()


def test_both_record_where_one_hangs(two, tmp_path):
    (tmp_path / "hang.py").write_text(HANG)
    two(str(tmp_path / "hang.py"), watchdog_seconds=4, heartbeat_timeout_seconds=100)
    heads, steps, stacks = zip(*(flight(tmp_path, process) for process in (0, 1)), strict=True)
    assert [head["process"] for head in heads] == [0, 1] and {head["reason"] for head in heads} == {"hang"}
    assert "a_lock_that_nobody_frees" in stacks[1] and "a_lock_that_nobody_frees" not in stacks[0]
    assert all(lines[-1]["step"] <= 12 and lines[-1]["loss"] > 0 and lines[-1]["ids"] for lines in steps)
    said = (tmp_path / "log0").read_text()
    assert "watchdog: no progress for" in said and "process-0-" in said


def test_a_peer_that_is_stopped_dead_ends_the_other(two, tmp_path):
    first, second = two("-m", "launch.train", watchdog_seconds=2, heartbeat_timeout_seconds=10)
    run = Training(tmp_path / "run", tmp_path, STEPS, tmp_path / "log0", {})
    run.until(lambda: run.step() >= 12 or first.poll() is not None, "step 12")
    second.send_signal(signal.SIGSTOP)
    head, _, stacks = flight(tmp_path, 0)
    assert head["process"] == 0 and "aether/train/" in stacks
    assert first.wait(100) == -signal.SIGABRT, run.said(20)
