"""Small files of local and remote folders, and the lock that keeps processes apart."""

import threading

import numpy as np
import pytest

from aether.data import files
from aether.data.tokenizers import Bytes, TextTokenizer, Tokenizer
from aether.errors import InputError, StorageError


@pytest.mark.parametrize("where", ["local", "remote"])
def test_a_folder_is_the_same_on_a_disk_and_on_a_store(where, far, tmp_path):
    folder = "far://bucket/some" if where == "remote" else str(tmp_path / "some")
    assert files.sizes(folder) == {} and files.read(f"{folder}/a.json") is None
    files.write(f"{folder}/a.bin", b"ab", memoryview(b"cde"))
    files.write_json(f"{folder}/a.json", dict(x="ö"))
    files.write(f"{folder}/in/b.json", b"[1]")
    assert files.read(f"{folder}/a.bin") == b"abcde" and files.read_json(f"{folder}/a.json") == dict(x="ö")
    assert files.read_json(f"{folder}/in/b.json") is None and files.read_json(f"{folder}/a.bin") is None
    assert files.read(f"{folder}/a.bin/c") is None
    assert files.sizes(folder) == {"a.bin": 5, "a.json": 15}


def test_arrays(tmp_path, rng):
    for array in (rng.integers(0, 9, 1000).astype(np.uint16), np.zeros(0, np.int64)):
        files.write_array(str(tmp_path / "a.npy"), array)
        found = np.load(tmp_path / "a.npy")
        assert found.dtype == array.dtype and np.array_equal(found, array)


def test_who_waits_for_a_lock_says_so(tmp_path):
    lines, waits, inside = [], threading.Event(), []
    file = str(tmp_path / "out/lock")

    def wait():
        with files.alone(file, lambda line: (lines.append(line), waits.set())):
            inside.append(True)

    with files.alone(file, lines.append):
        other = threading.Thread(target=wait)
        other.start()
        assert waits.wait(timeout=30) and not inside
    other.join(timeout=30)
    assert inside and lines == [f"waiting for another process, which prepares {tmp_path / 'out'}"]


def test_a_lock_where_no_folder_can_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is a file; give a folder"):
        with files.alone(str(tmp_path / "file/lock"), print):
            pass
    with pytest.raises(StorageError, match="data.cache_dir"):
        with files.alone(str(tmp_path / "file/deeper/lock"), print):
            pass


def test_a_tokenizer_without_its_methods_cannot_be_made():
    for kind in (Tokenizer, TextTokenizer):
        with pytest.raises(TypeError, match="abstract"):
            kind("x", [b"a"], 0, {})
    assert Bytes().encode("é").tolist() == [195, 169]
