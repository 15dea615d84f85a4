"""The run folder: atomic files, a remote folder seen from two machines, and disks that fail."""

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
import threading

import fsspec
import pytest

from aether import workdir
from aether.errors import InputError, StorageError
from aether.workdir import Workdir

REMOTE = "memory://bucket/run"


@pytest.fixture(autouse=True)
def empty_memory():
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    return fs


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Open the remote run as if on the machine of that name."""

    def open_on(name, **kwargs):
        monkeypatch.setenv("AETHER_CACHE", str(tmp_path / name))
        return Workdir(REMOTE, **kwargs)

    return open_on


def test_local_folder_is_made_only_when_something_is_written(tmp_path):
    work = Workdir(str(tmp_path / "runs" / "a"))
    assert work.path == str(work.local) and not work.remote and not work.exists()
    assert not (tmp_path / "runs").exists()
    work.write_json("config.json", {"ⵟ": 1})
    assert work.exists() and work.read_json("config.json") == {"ⵟ": 1}
    assert work.checkpoints == str(tmp_path / "runs" / "a" / "checkpoints")
    assert work.file("tensorboard/x").parent.is_dir()


def test_local_path_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Workdir("runs/b").path == str(tmp_path / "runs" / "b")
    assert Workdir(f"file://{tmp_path}/c").local == tmp_path / "c"


def test_other_processes_do_not_write(tmp_path):
    work = Workdir(str(tmp_path / "a"), primary=False)
    work.write_json("config.json", {})
    assert work.file("x/y") == tmp_path / "a" / "x" / "y"
    assert not (tmp_path / "a").exists()


def test_wrong_paths_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match=r"file is a file"):
            Workdir(str(path))
    with pytest.raises(InputError, match="nosuch://x/y"):
        Workdir("nosuch://x/y")
    with pytest.raises(InputError, match="empty"):
        Workdir("")


@pytest.mark.parametrize(("address", "driver", "extra"), [("s3://b/r", "s3fs", "s3"), ("gs://b/r", "gcsfs", "gcs")])
def test_missing_driver_names_the_extra(address, driver, extra, monkeypatch, tmp_path):
    monkeypatch.setenv("AETHER_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, driver, None)
    monkeypatch.setattr(sys.modules["fsspec.registry"], "_registry", {})
    with pytest.raises(InputError, match=rf'aether\[{extra}\]"'):
        Workdir(address)


def test_missing_and_damaged_json(tmp_path):
    work = Workdir(str(tmp_path))
    with pytest.raises(InputError, match=r"has no config\.json"):
        work.read_json("config.json")
    (tmp_path / "config.json").write_text('{"a": ')
    with pytest.raises(StorageError, match="config.json"):
        work.read_json("config.json")


def test_a_really_full_disk(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no permission to mount a tmpfs")
    try:
        work = Workdir(str(tmp_path))
        work.write_json("config.json", {"a": 1})
        with pytest.raises(StorageError, match="big.json: disk full"):
            work.write_json("big.json", "x" * 200_000)
        assert sorted(os.listdir(tmp_path)) == ["config.json"]
        assert work.read_json("config.json") == {"a": 1}
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_remote_round_trip_between_two_machines(machine, tmp_path):
    one = machine("one")
    assert not one.exists() and one.checkpoints == f"{REMOTE}/checkpoints"
    one.write_json("config.json", {"by": "one"})
    one.file("metrics.jsonl").write_text("1\n")
    one.file("tokenizer/spec.json").write_text("{}")
    one.sync()

    two = machine("two")
    assert two.local != one.local and two.local.is_relative_to(tmp_path / "two")
    assert two.read_json("config.json") == {"by": "one"}
    assert (two.local / "tokenizer" / "spec.json").read_text() == "{}"
    two.file("metrics.jsonl").write_text("2\n")  # same size: only the content differs
    two.sync()

    assert (one.local / "metrics.jsonl").read_text() == "1\n"
    assert (machine("one").local / "metrics.jsonl").read_text() == "2\n"


def test_the_remote_is_the_truth(machine, empty_memory):
    one = machine("one")
    one.file("a").write_text("saved")
    one.file("gone").write_text("saved")
    one.sync()
    one.file("a").write_text("never uploaded")
    one.file("new").write_text("never uploaded")
    empty_memory.rm("/bucket/run/gone")
    again = machine("one")
    assert again.local == one.local
    assert (again.local / "a").read_text() == "saved"
    assert not again.exists("new") and not again.exists("gone")


def test_only_what_changed_travels(machine, empty_memory, monkeypatch):
    sent, fetched = [], []
    pipe, cat = type(empty_memory).pipe_file, type(empty_memory).cat_file
    monkeypatch.setattr(type(empty_memory), "pipe_file", lambda s, p, *a: (sent.append(p), pipe(s, p, *a))[1])
    monkeypatch.setattr(type(empty_memory), "cat_file", lambda s, p, *a: (fetched.append(p), cat(s, p, *a))[1])
    one = machine("one")
    one.file("a").write_text("1")
    one.file("b/c").write_text("1")
    one.sync("a")
    one.sync()
    one.sync()
    assert sent == ["/bucket/run/a", "/bucket/run/b/c"]
    machine("one").sync()
    assert len(sent) == 2 and fetched == []


def test_checkpoints_stay_away_from_the_mirror(machine, empty_memory):
    empty_memory.pipe_file("/bucket/run/checkpoints/1/array", b"x" * 100)
    empty_memory.pipe_file("/bucket/run/tokenizer/checkpoints/x", b"x")
    one = machine("one")
    assert not (one.local / "checkpoints").exists()
    assert one.exists("tokenizer/checkpoints/x")


def test_readers_never_touch_the_mirror_of_the_writer(machine, empty_memory):
    writer = machine("one")
    writer.file("metrics.jsonl").write_text("1\n")
    writer.sync()
    writer.file("metrics.jsonl").write_text("1\n2\n")
    reader = machine("one", primary=False)
    (reader.local / "metrics.jsonl").write_text("other")
    reader.sync()
    assert (writer.local / "metrics.jsonl").read_text() == "1\n2\n"
    assert empty_memory.cat_file("/bucket/run/metrics.jsonl") == b"1\n"


def test_a_failing_remote_is_a_storage_error(machine, empty_memory, monkeypatch):
    one = machine("one")
    one.file("a").write_text("1")

    def denied(*args, **kwargs):
        raise RuntimeError("no credentials")

    monkeypatch.setattr(type(empty_memory), "pipe_file", denied)
    with pytest.raises(StorageError, match="memory://bucket/run.*no credentials"):
        one.sync()
    monkeypatch.setattr(type(empty_memory), "ls", denied)
    with pytest.raises(StorageError, match="read memory://bucket/run"):
        machine("two")


def test_json_is_readable_text(tmp_path):
    Workdir(str(tmp_path)).write_json("config.json", {"a": {"b": [1, 2]}})
    text = (tmp_path / "config.json").read_text()
    assert text.endswith("}\n") and "\n" in text[:-1] and json.loads(text) == {"a": {"b": [1, 2]}}


# --- one training a folder


HOLDER = """
import subprocess, sys, time
from aether.workdir import Workdir

with Workdir(sys.argv[1]).alone(print):
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], close_fds=False)
    print(child.pid, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(workdir, "PATIENCE", 0.0)


def test_only_one_process_holds_a_folder_and_a_killed_one_lets_go(tmp_path, impatient):
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True) as holder:
        child = int(holder.stdout.readline())
        try:
            who = re.escape(f"Another process (pid {holder.pid} on {socket.gethostname()}) trains in {folder};")
            refused = pytest.raises(InputError, match=f"^{who} wait until it ends, or give another --workdir.$")
            with refused, Workdir(str(folder)).alone(print):
                pass
            assert os.listdir(folder) == [workdir.LOCK] and not Workdir(str(folder)).exists()
            holder.kill()
            holder.wait()
            with Workdir(str(folder)).alone(print):
                assert f"pid {os.getpid()} on" in (folder / workdir.LOCK).read_text()
                os.kill(child, 0)  # it lives, and does not keep the lock
            assert os.listdir(folder) == []
        finally:
            holder.kill()
            os.kill(child, 9)


def test_one_that_is_about_to_end_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir, "PATIENCE", 60.0)
    first, work = contextlib.ExitStack(), Workdir(str(tmp_path))
    first.enter_context(work.alone(print))
    timer = threading.Timer(0.2, first.close)
    timer.start()
    with work.alone(print):
        assert os.listdir(tmp_path) == [workdir.LOCK]
    timer.join()


@pytest.mark.parametrize("write", [False, True])
def test_a_folder_is_let_go_after_an_error_and_kept_if_it_has_content(tmp_path, impatient, write):
    work = Workdir(str(tmp_path / "runs" / "a"))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError) as caught, work.alone(print):
            if write:
                work.write_json("config.json", {})
            raise ZeroDivisionError
        assert caught.tb and os.listdir(tmp_path) == ["runs"] * write
    if write:
        assert os.listdir(work.local) == ["config.json"]


def test_a_lock_that_is_removed_while_it_is_taken_is_none(tmp_path, monkeypatch):
    """Another process that ends between the opening of its file and the lock on it takes the file away."""
    monkeypatch.setattr(workdir, "PATIENCE", 0.2)
    flock, removed = fcntl.flock, []

    def late(*args):
        if not removed:
            removed.append((tmp_path / workdir.LOCK).unlink())
        flock(*args)

    monkeypatch.setattr(fcntl, "flock", late)
    with Workdir(str(tmp_path)).alone(print), pytest.raises(InputError, match="Another process"):
        with Workdir(str(tmp_path)).alone(print):
            pass
    assert removed and os.listdir(tmp_path) == []


def test_the_lock_of_another_stays(tmp_path, impatient):
    """A folder that somebody moved away and made anew belongs to the one who trains in it now."""
    first, work = contextlib.ExitStack(), Workdir(str(tmp_path / "run"))
    with first:
        first.enter_context(work.alone(print))
        work.local.rename(tmp_path / "old")
        with work.alone(print):
            first.close()
            assert os.listdir(work.local) == [workdir.LOCK]
    assert os.listdir(tmp_path) == ["old"]


@pytest.mark.parametrize("reason", [errno.ENOTSUP, errno.ENOLCK, errno.EINVAL, errno.ENOSYS])
def test_without_locks_training_goes_on_and_says_so(tmp_path, monkeypatch, reason):
    def refuse(*args):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(fcntl, "flock", refuse)
    said, work = [], Workdir(str(tmp_path))
    with work.alone(said.append), work.alone(said.append):
        told = f"warning: {tmp_path} cannot be locked ({os.strerror(reason)}); see to it that nothing else trains there"
        assert said == [told, told]


def test_a_full_disk_does_not_hinder_the_lock(tmp_path, impatient, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with Workdir(str(tmp_path)).alone(pytest.fail), pytest.raises(InputError, match="Another process"):
        with Workdir(str(tmp_path)).alone(pytest.fail):
            pass


def test_a_remote_folder_is_never_held(machine, empty_memory):
    with machine("one").alone(pytest.fail), machine("two").alone(pytest.fail):
        assert not empty_memory.store and not (machine("one").local / workdir.LOCK).exists()
