"""A save counts only once it is verified, and only then is anything older deleted."""

import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aether import storage
from aether.checkpoint import Checkpoints, record, tensors, writer
from aether.config import CheckpointConfig
from aether.errors import StorageError


@pytest.fixture
def opened(tmp_path):
    """Return a function that opens the checkpoints in a folder; all are closed after the test."""
    made = []

    def open_(folder=tmp_path / "c", log=lambda line: None, **policy):
        made.append(Checkpoints(str(folder), CheckpointConfig(**{"keep_best": 0, **policy}), log=log))
        return made[-1]

    yield open_
    for c in made:
        c.close()


def state(n):
    return {"w": jnp.full((64, 64), n, jnp.float32), "n": jnp.int32(n)}


def largest(folder):
    return max((p for p in Path(folder, "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(folder):
    data = bytearray(largest(folder).read_bytes())
    data[len(data) // 2] ^= 1
    largest(folder).write_bytes(data)


def cut(folder):
    os.truncate(largest(folder), 10)


def lose(folder):
    largest(folder).unlink()


def forget(folder):
    content = json.loads((folder / "meta.json").read_text())
    content["meta"] = {}
    (folder / "meta.json").write_text(json.dumps(content))


@pytest.fixture
def spoil(monkeypatch):
    """Return a function that has a damage done to everything written, after it is sealed; without one, it heals."""
    seal = record.seal

    def set_(damage):
        monkeypatch.setattr(writer, "seal", lambda folder, *a, **k: (seal(folder, *a, **k), damage(folder)))

    return lambda damage=lambda folder: None: set_(damage)


def test_a_damaged_save_is_left_out_and_the_next_one_counts(opened, spoil, tmp_path):
    said = []
    c = opened(keep_last=1, log=said.append)
    c.save(1, state(1), meta={})
    c.wait()
    spoil(flip)
    c.save(2, state(2), meta={})
    c._writer._thread.join()
    assert c.steps() == [1] and [p.name for p in (tmp_path / "c").iterdir()] == ["1"]
    spoil()
    c.save(3, state(3), meta={})
    assert len(said) == 1 and "Checkpoint 2 was damaged as it was written" in said[0] and "checksum" in said[0]
    c.wait()
    assert c.steps() == [3]


@pytest.mark.parametrize("damage", [flip, cut, lose, forget])
def test_damage_is_an_error_where_nothing_follows_and_deletes_nothing(opened, spoil, tmp_path, damage):
    c = opened(keep_last=1)
    c.save(1, state(1), meta={"a": 1})
    c.wait()
    spoil(damage)
    c.save(2, state(2), meta={"a": 1})
    with pytest.raises(StorageError, match="Checkpoint 2 was damaged as it was written to .*left out"):
        c.close()
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["1"]
    assert int(c.restore(state(0))[0]["n"]) == 1


def test_a_checkpoint_stays_where_an_older_one_cannot_be_deleted(opened, monkeypatch):
    c = opened(keep_last=1)
    c.save(1, state(1), meta={})
    c.wait()
    with monkeypatch.context() as m:
        m.setattr(type(c._home), "delete", lambda self, folder: (_ for _ in ()).throw(PermissionError("no")))
        c.save(2, state(2), meta={})
        with pytest.raises(StorageError, match="Cannot write checkpoints in .*no"):
            c.wait()
    assert c.steps() == [1, 2] and int(c.restore(state(0))[0]["n"]) == 2


def test_two_damaged_in_a_row_are_an_error(opened, spoil):
    c = opened()
    spoil(flip)
    c.save(1, state(1), meta={})
    c.save(2, state(2), meta={})
    with pytest.raises(storage.DamagedError, match="Checkpoint 2 was damaged"):
        c.save(3, state(3), meta={})


def test_what_orbax_says_of_the_arrays_is_compared_with_what_was_asked(opened, monkeypatch):
    start = tensors.start
    monkeypatch.setattr(tensors, "start", lambda folder, leaves: start(folder, {**leaves, "w": leaves["w"][:3]}))
    c = opened()
    c.save(1, state(1), meta={})
    with pytest.raises(storage.DamagedError, match=r"w is \(\[3, 64\], 'float32'\) .*, not \(\[64, 64\], 'float32'\)"):
        c.wait()


def test_verifying_and_deleting_are_not_the_training_threads_work(opened, monkeypatch):
    threads = []
    for module, name in ((writer, "verify"), (writer, "seal"), (storage, "fingerprint")):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, real=real, **k: (threads.append(threading.current_thread()), real(*a, **k))[1]
        )
    c = opened(keep_last=1)
    removed = type(c._home).delete
    monkeypatch.setattr(
        type(c._home), "delete", lambda *a: (threads.append(threading.current_thread()), removed(*a))[1]
    )
    for step in (1, 2):
        c.save(step, state(step), meta={})
    c.wait()
    assert c.steps() == [2] and len(threads) > 6 and threading.main_thread() not in threads


def test_a_state_on_the_cpu_may_change_under_the_writer(opened, monkeypatch):
    """Donated or overwritten while the writer has not begun: what is saved is what was given."""
    go, start = threading.Event(), tensors.start
    monkeypatch.setattr(tensors, "start", lambda *a: (go.wait(30), start(*a))[1])
    made = {**state(1), "host": np.ones(3)}
    c = opened()
    c.save(1, made, meta={})
    made["host"][:] = 7
    jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)({k: made[k] for k in "wn"})
    go.set()
    got, _, _ = c.restore({**state(0), "host": np.zeros(3)})
    assert (np.asarray(got["w"]) == 1).all() and int(got["n"]) == 1 and (got["host"] == 1).all()


def test_a_read_only_disk_is_an_error_and_what_is_there_can_be_read(opened, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if not mount or subprocess.run([mount, "-t", "tmpfs", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root only")
    try:
        c = opened(disk / "c")
        c.save(1, state(1), meta={})
        c.wait()
        subprocess.run([mount, "-o", "remount,ro", disk], check=True)
        c.save(2, state(2), meta={})
        with pytest.raises(
            StorageError, match="Cannot write checkpoints in .*disk/c: .*(Read-only file system|READ_ONLY)"
        ):
            c.wait()
        assert int(c.restore(state(0))[0]["n"]) == 1 and c.steps() == [1]
        c.close()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_damaged_save_under_way_does_not_end_a_run_that_goes_back(opened, spoil):
    said = []
    c = opened(log=said.append)
    c.save(1, state(1), meta={})
    c.wait()
    spoil(flip)
    c.save(2, state(2), meta={})
    assert c.before(5) == 1 and len(said) == 1 and "Checkpoint 2 was damaged" in said[0]
    c.save(3, state(3), meta={})
    with pytest.raises(storage.DamagedError, match="Checkpoint 3 was damaged"):
        c.before(5)


def test_the_newest_sound_one_of_those_asked_for(opened, tmp_path):
    c = opened(keep_last=5)
    for step in (1, 2, 3, 4):
        c.save(step, state(step), meta={})
    c.wait()
    assert c.is_sound(3)
    flip(tmp_path / "c" / "3")
    assert not c.is_sound(3)
    assert c.restore(state(0), at_most=3)[2] == 2
    assert c.steps() == [1, 2, 4]


def test_files_are_on_the_disk_before_an_older_checkpoint_goes(opened, tmp_path, monkeypatch):
    """Against a power cut: what Orbax wrote is synced, each file and folder, before anything is deleted."""
    synced, whole = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), whole(fd))[1])
    c = opened(keep_last=1)
    c.save(1, state(1), meta={})
    c.wait()
    folder = next(Path(p) for p in synced if p.endswith("/state"))
    names = {str(Path(p).relative_to(folder)) for p in synced if Path(p).is_relative_to(folder)}
    place = tmp_path / "c" / "1" / "state"
    assert names >= {str(p.relative_to(place)) for p in place.rglob("*")} | {"."}
    assert synced.index(str(folder)) < next(i for i, p in enumerate(synced) if p.endswith("meta.json"))
