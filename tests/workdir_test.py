"""The run folder: atomic files, a remote folder seen from two machines, and disks that fail."""

import json
import os
import subprocess
import sys

import fsspec
import pytest

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
