"""What processes tell each other, with two real ones; signals that one of them sees."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from aether.errors import StorageError
from aether.train import agree
from aether.train.signals import BETWEEN, Stop
from aether.workdir import Workdir

PROGRAM = """
import json, os, signal, sys
from contextlib import ExitStack
import jax
from aether import processes
from aether.config import build
from aether.errors import AetherError, InputError, StorageError
from aether.parallel import make_mesh
from aether.train import agree, setup
from aether.train.signals import BETWEEN, Stop
from launch import cli

rank = int(os.environ["JAX_PROCESS_ID"])


def outcome(call):
    try:
        return call()
    except AetherError as error:
        return f"{type(error).__name__}: {error}"


def read(value, error=None):
    assert rank == 0, "only process 0 may look"
    if error:
        raise error
    return value


def begin(config, workdir):
    with ExitStack() as held:
        setup.start(config, workdir, 0.0, held)


def main(args):
    config = build({"faults": {"start_timeout_seconds": 100}})
    setup._saved = lambda workdir: read(0, InputError("the lock is behind us."))
    processes.start(config, WORKDIR)
    long = "x" * 10_000  # more than the smallest message
    found = {
        "first": agree.of_first(lambda: read({"a": [1, None], "b": long})) == {"a": [1, None], "b": long},
        "storage": outcome(lambda: agree.of_first(lambda: read(0, StorageError("the disk is full.")))),
        "input": outcome(lambda: agree.of_first(lambda: read(0, InputError("no such step.")))),
        "largest": agree.largest(3 + rank),
        "equal": outcome(lambda: agree.check_equal("the tokenizer", "abc", "copy it")),
        "unequal": outcome(lambda: agree.check_equal("the tokenizer", "abc"[: 3 - rank], "copy it")),
        "free": outcome(lambda: begin(config, WORKDIR)),
        "held": outcome(lambda: begin(config, HELD)),
    }
    stop = Stop()
    stop.begin()
    patrol = stop.every_few()
    asked = [patrol(item) for item in range(BETWEEN // 2)]
    if rank == 1:
        stop.note(signal.SIGTERM, None)
    asked += [patrol(item) for item in range(BETWEEN)]
    mesh = make_mesh(config.mesh)
    flags = jax.jit(lambda stop: stop.max())(stop.flags(mesh)["stop"])
    found |= {"patient": stop.patient, "asked": asked, "flags": int(flags), "stop": stop()}
    print(json.dumps(found), flush=True)


sys.exit(cli.run(main, cli.new_flags(), "doc", several=True))
"""


def test_two_processes_know_the_same(tmp_path):
    program = PROGRAM.replace("WORKDIR", repr(str(tmp_path / "run"))).replace("HELD", repr(str(tmp_path / "held")))
    (tmp_path / "program.py").write_text(program)
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "launch.local", "--processes=2", "--devices=2", "--module=program"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    with Workdir(str(tmp_path / "held")).alone(print):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("[1] ") for line in done.stdout.splitlines() if line.endswith("}")]
    one, other = map(json.loads, lines)
    assert one == other
    assert one["first"] and one["largest"] == 4 and one["equal"] is None and one["patient"]
    assert one["storage"] == "StorageError: the disk is full." and one["input"] == "InputError: no such step."
    assert one["unequal"] == "InputError: the tokenizer is ab on process 1 and abc on process 0; copy it."
    assert one["free"] == "InputError: the lock is behind us."
    assert one["held"].startswith(
        f"InputError: Another process (pid {os.getpid()} on {socket.gethostname()}) trains in "
    )
    # The signal comes between two questions: both go on to the next one, and both stop there.
    assert one["asked"] == [True] * BETWEEN + [False] * (BETWEEN // 2)
    assert one["flags"] == 15 and one["stop"] == "SIGTERM"


def test_one_process_asks_nobody():
    assert agree.of_first(lambda: {"a": 1}) == {"a": 1} and agree.largest(7) == 7
    agree.check_equal("the tokenizer", "a" * 1000, "copy it")
    with pytest.raises(StorageError, match="full"):
        agree.of_first(lambda: (_ for _ in ()).throw(StorageError("full")))


def test_signals_of_one_process():
    stop = Stop()
    stop.begin()
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    assert stop() == stop.seen == "" and stop.flags(mesh) == {} and not stop.patient
    with pytest.raises(KeyboardInterrupt):
        stop.note(2, None)
    patient = Stop()
    patient.patient = True
    patrol = patient.every_few()
    assert patrol(0)
    patient.note(15, None)
    assert patient() == patient.seen == patient.ask() == "SIGTERM" and not patrol(1)
    patient.note(15, None)  # a scheduler may repeat itself; a person's second Ctrl-C means it
    with pytest.raises(KeyboardInterrupt):
        patient.note(2, None)
