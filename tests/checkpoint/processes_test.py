"""Two processes: one verdict on every save and restore, whatever one of them cannot write, cannot see, or dies of."""

import os
import subprocess
import sys
import textwrap

import pytest

HEAD = """
    import errno, pathlib
    import jax, numpy as np
    from jax.experimental import multihost_utils
    from jax.sharding import NamedSharding, PartitionSpec as P
    from aether import errors, storage
    from aether.checkpoint import Checkpoints, checkpoints, home as homes, tensors, together, writer
    from aether.config import CheckpointConfig

    folder = pathlib.Path(HOME)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    def make(n, rows=4, dtype="float32"):
        whole = np.full((rows, 2), n, dtype)
        return {"w": jax.make_array_from_callback(whole.shape, NamedSharding(mesh, P("x")), lambda i: whole[i])}
    check = lambda got, n: all((np.asarray(s.data) == n).all() for s in got["w"].addressable_shards)
    sync = multihost_utils.sync_global_devices
    said = []
    def opened(where=folder, **policy):
        return Checkpoints(str(where), CheckpointConfig(**policy), log=said.append)
    def raised(kind, work):
        try:
            work()
        except errors.AetherError as e:
            assert type(e).__name__ == kind, repr(e)
            return str(e)
        raise AssertionError("nothing was raised")
"""

TOGETHER = (
    HEAD
    + """
    c = opened(keep_last=2)
    for step in (1, 2, 3):
        c.save(step, make(step), meta={})
    c.wait()
    got, _, step = c.restore(make(0))
    assert step == 3 and check(got, 3) and c.steps() == [2, 3]
    sync("damage")

    # What only process 0 looks at is damaged.
    if RANK == 0:
        sharding = folder / "3" / "state" / "_sharding"
        sharding.write_text(sharding.read_text().replace("x", "y"))
    got, _, step = c.restore(make(0))
    assert step == 2 and check(got, 2) and c.steps() == [2] and len(said) == 1, (step, c.steps(), said)
    c.save(3, make(3), meta={})
    c.wait()
    assert c.steps() == [2, 3]

    # Another model, a step that is not there.
    text = raised("InputError", lambda: c.restore(make(0, rows=6)))
    assert "w as float32[4, 2], but here it is float32[6, 2]" in text, text
    assert "There is no checkpoint 9" in raised("InputError", lambda: c.restore(make(0), 9))

    # A disk that shows process 1 nothing, and then the files late.
    if RANK == 1:
        homes.Home.steps, seen = (lambda self: []), homes.Home.steps
        tries, read, nap = [], tensors.read, checkpoints.time.sleep
        def late(*a):
            tries.append(1)
            if len(tries) < 3:
                raise FileNotFoundError("NOT_FOUND: no manifest")
            return read(*a)
        tensors.read, checkpoints.time.sleep = late, lambda s: None
    other = opened(keep_last=2)
    got, _, step = other.restore(make(0))
    assert step == 3 and check(got, 3) and other.latest() == (None if RANK else 3)
    if RANK == 1:
        assert len(tries) == 3
        tensors.read, checkpoints.LAG = (lambda *a: (_ for _ in ()).throw(FileNotFoundError("none"))), 0
    text = raised("StorageError", lambda: other.restore(make(0)))
    assert "is sound on process 0 but cannot be read here" in text and ("(process 1)" in text), text
    sync("lag")
    assert (folder / "3").exists()
    if RANK == 1:
        homes.Home.steps, tensors.read, checkpoints.time.sleep = seen, read, nap

    # Process 1, then process 0, cannot write: both are told at the next save, and the one after it works.
    start = tensors.start
    for rank in (1, 0):
        if RANK == rank:
            def full(*a):
                raise OSError(errno.ENOSPC, "No space left on device")
            tensors.start = full
        c.save(4, make(4), meta={})
        text = raised("StorageError", lambda: c.save(5, make(5), meta={}))
        assert "No space is left for checkpoints in" in text and ("(process 1)" in text) == (rank == 1), text
        tensors.start = start
        sync(f"swept{rank}")
        assert c.steps() == [2, 3]
        assert sorted(p.name for p in folder.iterdir() if p.name[0] != "d") == ["2", "3"]

    # What is written does not come back as it was: left out once, an error the second time.
    if RANK == 0:
        sealed, writer.seal = writer.seal, (
            lambda f, *a, **k: (sealed(f, *a, **k), (f / "state" / "_METADATA").write_text("{}")))
    c.save(4, make(4), meta={})
    c.save(5, make(5), meta={})
    assert "Checkpoint 4 was damaged as it was written" in said[-1], said
    text = raised("DamagedError", lambda: c.save(6, make(6), meta={}))
    assert "Checkpoint 5 was damaged" in text and c.steps() == [2, 3]
    if RANK == 0:
        writer.seal = sealed
    c.save(6, make(6), meta={})
    c.close()
    assert c.steps() == [3, 6] and check(opened().restore(make(0))[0], 6)
    print("done")
"""
)


def test_two_processes_save_restore_and_fail_as_one(tmp_path, run_processes):
    outs = run_processes(TOGETHER.replace("HOME", repr(str(tmp_path / "c"))), 2)
    assert [out.split()[-1] for out in outs] == ["done"] * 2


FULL = (
    HEAD
    + """
    c = opened()
    noise = np.random.default_rng(0).normal(size=(500_000, 2)).astype("float32")
    big = {"w": jax.make_array_from_callback(noise.shape, NamedSharding(mesh, P("x")), lambda i: noise[i])}
    c.save(1, make(1), meta={})
    c.wait()
    for step in (2, 3):
        c.save(step, big, meta={})
        text = raised("StorageError", c.wait)
        assert "No space is left for checkpoints" in text, text
    c.save(4, make(4), meta={})
    c.close()
    sync("end")
    assert sorted(p.name for p in folder.iterdir()) == ["1", "4"], list(folder.iterdir())
    print("done")
"""
)


def test_a_full_disk_is_an_error_on_both_and_is_swept(tmp_path, run_processes):
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True)
    except FileNotFoundError:
        mounted = None
    if mounted is None or mounted.returncode:
        pytest.skip("a small file system can be mounted by root only")
    try:
        outs = run_processes(FULL.replace("HOME", repr(str(disk / "c"))), 2)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    assert all("done" in out.split() for out in outs), outs  # Orbax's tasks that failed may have the last word


KILLS = """
    import os, pathlib, random, signal, socket, sys, time, traceback
    import jax, jax.numpy as jnp, numpy as np
    import orbax.checkpoint
    from aether.checkpoint import Checkpoints
    from aether.config import CheckpointConfig

    # Children are forked before any backend starts, so that each kill costs no imports.
    home = pathlib.Path(HOME); rng = random.Random(0); config = CheckpointConfig(keep_last=2)

    def child(rank, port, status):
        from jax.sharding import NamedSharding, PartitionSpec as P
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", 2, rank)
        mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        def make(n):
            put = lambda i: np.full((250_000,), n, np.float32)[i]
            return {k: jax.make_array_from_callback((250_000,), NamedSharding(mesh, P("x")), put) for k in "ab"}
        checkpoints = Checkpoints(str(home), config)
        step, newest = 0, checkpoints.latest()
        if newest is not None:
            state, meta, step = checkpoints.restore(make(0))
            assert step == newest == meta["step"], (step, newest, meta)
            assert all((np.asarray(s.data) == step).all() for v in state.values() for s in v.addressable_shards)
            assert all(p.name.isdecimal() for p in home.iterdir()), list(home.iterdir())
        os.write(status, step.to_bytes(4, "little"))
        while True:
            step += 1
            checkpoints.save(step, make(step), meta={"step": step})
            os.write(status, step.to_bytes(4, "little"))  # so the step before is complete

    def fork(rank, port):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                child(rank, port, write)
            except AssertionError:
                traceback.print_exc()
                os._exit(7)
            finally:
                os._exit(1)  # the other one is gone
        os.close(write)
        return pid, read

    committed, unfinished = 0, 0
    for turn in range(8):
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        pids, reads = zip(*(fork(rank, port) for rank in (0, 1)))
        restored = [int.from_bytes(os.read(r, 4), "little") for r in reads]  # empty, hence 0, if the child failed
        assert restored[0] == restored[1] >= committed, (restored, committed)
        committed = restored[0]
        for _ in range(rng.randint(1, 4)):
            committed = max(restored[0], int.from_bytes(os.read(reads[turn % 2], 4), "little") - 1)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(pids[turn % 2], signal.SIGKILL)
        time.sleep(rng.uniform(0, 0.1))  # the other one goes on alone for a moment
        os.kill(pids[1 - turn % 2], signal.SIGKILL)
        ends = [os.waitpid(pid, 0)[1] for pid in pids]
        assert os.WTERMSIG(ends[turn % 2]) == signal.SIGKILL and all(e != 7 << 8 for e in ends), ends
        unfinished += any(not p.name.isdecimal() for p in home.iterdir())
    print(committed, unfinished)
    assert committed >= 6 and unfinished >= 1, (committed, unfinished)
"""


@pytest.mark.slow
def test_a_kill_of_either_at_any_moment_leaves_complete_checkpoints(tmp_path):
    script = textwrap.dedent(KILLS).replace("HOME", repr(str(tmp_path / "c")))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        out = done.communicate(timeout=150)[0]
    finally:
        try:
            os.killpg(done.pid, 9)  # the children too
        except ProcessLookupError:
            pass
    assert done.returncode == 0, out
