"""Files on disks and object stores: atomic, copied, verified, and the reasons for which they fail."""

import errno
import os

import jax
import pytest
from etils import epath

from aether import storage
from aether.errors import InputError, StorageError
from aether.storage import REASONS, DamagedError, storage_errors, write_atomic


@pytest.fixture
def folder(tmp_path):
    made = epath.Path(tmp_path / "folder")
    (made / "deep").mkdir(parents=True)
    (made / "a").write_bytes(b"12345")
    (made / "deep" / "b").write_bytes(b"")
    return made


def prints(folder, sums):
    return {str(p.relative_to(folder)): storage.fingerprint(p, sums) for p in storage.files_of(folder)}


def test_atomic_write_leaves_the_old_file_when_the_new_one_fails(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomic(path, b"old")

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"a\.json: disk full"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("code", REASONS)
def test_failures_of_a_disk_are_storage_errors(code):
    with pytest.raises(StorageError, match="x/y.*" + REASONS[code]), storage_errors("x/y"):
        raise OSError(code, "")


def test_other_failures_pass_through():
    with pytest.raises(FileNotFoundError), storage_errors("x"):
        open("/nonexistent/file")


def test_fingerprints_have_sizes_and_checksums(folder):
    assert prints(folder, False) == {"a": [5], "deep/b": [0]}
    assert prints(folder, True) == {"a": [5, 0xCBF53A1C], "deep/b": [0, 0]}  # CRC-32 as in zip files


def test_copies_are_equal_and_a_local_one_goes_away(folder, tmp_path):
    storage.copy_folder(folder, epath.Path(tmp_path / "new" / "copy"))
    assert prints(epath.Path(tmp_path / "new" / "copy"), True) == prints(folder, True)
    with storage.local_copy(folder) as copy:
        assert prints(copy, True) == prints(folder, True)
    assert not copy.exists() and folder.exists()


def test_damage_is_found_by_size_or_checksum(folder):
    sums, sizes = prints(folder, True), prints(folder, False)
    storage.verify(folder, sums, True)
    (folder / "a").write_bytes(b"12346")
    storage.verify(folder, sums, False)
    storage.verify(folder, sizes, True)
    with pytest.raises(DamagedError, match="a has another checksum"):
        storage.verify(folder, sums, True)
    (folder / "a").write_bytes(b"1234")
    with pytest.raises(DamagedError, match="a has 4 bytes, not 5"):
        storage.verify(folder, sums, False)
    (folder / "a").unlink()
    with pytest.raises(DamagedError, match="a is missing"):
        storage.verify(folder, sums, False)


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "voll"), True),
        (OSError(errno.EDQUOT, ""), True),
        (ValueError("RESOURCE_EXHAUSTED: write"), True),
        (OSError(errno.EIO, "Input/output error"), False),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: device memory"), False),
    ],
)
def test_a_full_disk_is_recognised_also_as_a_cause(error, full):
    outer = RuntimeError("while writing")
    outer.__cause__ = error
    assert list(storage.causes(outer)) == [outer, error]
    assert storage.is_full(error) == storage.is_full(outer) == full


@pytest.mark.parametrize(
    ("error", "damage"),
    [
        (FileNotFoundError("x"), True),
        (ValueError("not json"), True),
        (PermissionError("x"), False),
        (OSError(errno.EIO, "x"), False),
        (ValueError("UNAVAILABLE: try later"), False),
    ],
)
def test_damage_is_told_from_what_cannot_be_reached(error, damage):
    assert storage.is_damage(error) == damage


@pytest.mark.parametrize("error", [MemoryError(), ValueError("RESOURCE_EXHAUSTED: host")])
def test_lack_of_memory_is_neither(error):
    with pytest.raises(type(error)):
        storage.is_damage(error)


def test_errors_fit_on_a_line():
    assert storage.one_line(ValueError("a\n  b")) == "a b" and storage.one_line(KeyError()) == "KeyError"
    assert storage.one_line(ValueError("x" * 300)) == "x" * 200 + "..."


def test_a_new_folder_takes_its_place_whole_or_not_at_all(tmp_path):
    folder = storage.new_folder(str(tmp_path / "a/b/new"), "out")
    with storage.filled(folder) as made:
        (made / "file").write_text("mine")
        made.with_name("work").mkdir()
        assert not folder.exists()
    assert (folder / "file").read_text() == "mine" and os.listdir(folder.parent) == ["new"]
    with pytest.raises(RuntimeError), storage.filled(tmp_path / "c/d/new"):
        raise RuntimeError
    assert os.listdir(tmp_path) == ["a"]
    with pytest.raises(InputError, match="is not empty any more"), storage.filled(folder) as made:
        (made / "file").write_text("another's")
    assert (folder / "file").read_text() == "mine" and os.listdir(folder.parent) == ["new"]


def test_what_is_no_new_folder(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    for path, said in (("full", "not empty"), ("full/file", "not empty"), ("link", "a link"), ("s3://a/b", "remote")):
        with pytest.raises(InputError, match=f"--out is .*{said}"):
            storage.new_folder(path if "://" in path else str(tmp_path / path), "out")
