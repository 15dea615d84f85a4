"""Several processes of JAX on this machine."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest


def _run(script: str, count: int, devices: int = 1, *, timeout: float = 30) -> list[str]:
    """Run a script in `count` processes of JAX with `devices` CPU devices each; return what they printed.

    All are killed when one fails or the time is up.

    Raises:
      AssertionError: one failed; with what all have printed.
    """
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    start = (
        'import jax; jax.config.update("jax_cpu_collectives_implementation", "gloo")\n'
        f'jax.distributed.initialize("localhost:{port}", {count}, RANK)\n'
    )
    script = (start if count > 1 else "") + textwrap.dedent(script)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        outs = [Path(folder) / str(rank) for rank in range(count)]
        running = []
        for rank, out in enumerate(outs):
            command = [sys.executable, "-c", script.replace("RANK", str(rank))]
            file = stack.enter_context(out.open("w"))
            running.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
            stack.callback(running[-1].wait)
            stack.callback(running[-1].kill)
        end = time.monotonic() + timeout
        while any(p.poll() is None for p in running) and not any(p.poll() for p in running):
            if time.monotonic() > end:
                break
            time.sleep(0.05)
        failed = [p.poll() for p in running]
        stack.close()
        texts = [out.read_text() for out in outs]
    assert failed == [0] * count, "\n".join(f"-- {i}\n{text}" for i, text in enumerate(texts))
    return texts


@pytest.fixture
def run_processes():
    """The function above."""
    return _run
