"""Tokens of a remote shard: fetched once, kept whole, whatever happens in between."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from aether import remote
from aether.data import blocks, files
from aether.data.blocks import Blocks, fetch_all
from aether.errors import StorageError

COUNT, BLOCK = 5000, 1000
FILE = "far://bucket/tokens.npy"


@pytest.fixture
def tokens(far, monkeypatch, rng):
    """The array behind FILE, whose 11 blocks are of a thousand bytes."""
    monkeypatch.setattr(blocks, "BLOCK", BLOCK)
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0))
    array = rng.integers(0, 60_000, COUNT).astype(np.uint16)
    files.write_array(FILE, array)
    assert np.array_equal(np.load(far / "bucket/tokens.npy"), array)
    return array


def open_as(tmp_path):
    size = files.sizes("far://bucket")["tokens.npy"]
    return Blocks(FILE, str(tmp_path / "cache/tokens.npy"), size, COUNT, np.dtype(np.uint16))


def test_every_part_is_right_and_every_block_fetched_once(tokens, tmp_path, requests, rng):
    mine, other = open_as(tmp_path), open_as(tmp_path)
    requests()
    for i in range(200):
        begin = int(rng.integers(0, COUNT))
        end = min(begin + int(rng.integers(1, 900)), COUNT)
        assert np.array_equal((mine, other)[i % 2][begin:end], tokens[begin:end])
    asked = requests("read")
    assert len(asked) == len(set(asked)) == 11
    assert np.array_equal(open_as(tmp_path)[0:COUNT], tokens) and not requests("read")


def test_only_the_blocks_of_a_part_are_fetched(tokens, tmp_path, requests):
    shard = open_as(tmp_path)
    requests()
    assert shard.missing(0, 1) == [0] and shard.missing(436, 436 + 500) == [1] and shard.missing(435, 937) == [0, 1, 2]
    fetch_all((shard, block) for block in [*shard.missing(435, 937), *shard.missing(0, 1)])
    assert sorted(requests("read")) == [f"read bucket/tokens.npy {at}" for at in (0, 1000, 2000)]
    assert shard.missing(435, 937) == []


def test_a_block_that_does_not_fit_its_sum_is_fetched_again(tokens, tmp_path, requests):
    open_as(tmp_path)[0:COUNT]
    with open(tmp_path / "cache/tokens.npy", "r+b") as f:
        f.seek(3456)
        f.write(b"\0\1\2\3")
    requests()
    assert np.array_equal(open_as(tmp_path)[0:COUNT], tokens)
    assert requests("read") == ["read bucket/tokens.npy 3000"]


def test_a_lost_connection_leaves_what_came_before(tokens, tmp_path, requests, monkeypatch):
    from far_files import Far

    shard, whole, failed = open_as(tmp_path), Far.cat_file, []

    def lost(self, path, start=None, end=None, **kwargs):
        if start >= 5000:
            failed.append(start)
            raise ConnectionResetError("the store is gone")
        return whole(self, path, start=start, end=end)

    monkeypatch.setattr(Far, "cat_file", lost)
    with pytest.raises(StorageError, match=f"{FILE} cannot be read: ConnectionResetError: the store is gone"):
        shard[0:COUNT]
    monkeypatch.setattr(blocks, "TOGETHER", 1)
    failed.clear()
    with pytest.raises(StorageError, match="the store is gone"):
        fetch_all((shard, block) for block in shard.missing(0, COUNT))
    assert len(failed) <= 2 * 3, "after an error the other blocks are not tried"
    monkeypatch.setattr(Far, "cat_file", whole)
    requests()
    assert np.array_equal(open_as(tmp_path)[0:COUNT], tokens)
    assert [line.split()[-1] for line in requests("read")] == ["5000", "6000", "7000", "8000", "9000", "10000"]


def test_a_full_disk_names_the_cache(tokens, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    shard = open_as(tmp_path)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match="cannot be written: No space left on device; .* data.cache_dir"):
        shard[0:10]
    monkeypatch.undo()


READER = """
import sys
import numpy as np
from aether.data import blocks
from aether.data.blocks import Blocks
blocks.BLOCK = 1000
copy, size, seed, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
shard = Blocks("far://bucket/tokens.npy", copy, size, count, np.dtype(np.uint16))
print("open", flush=True)
found = np.zeros(count, np.uint16)
for block in np.random.default_rng(seed).permutation(100):
    part = slice(block * count // 100, (block + 1) * count // 100)
    found[part] = shard[part]
np.save(copy + f".{seed}.npy", found)
"""


def test_processes_share_a_copy_and_one_may_be_killed(tokens, far, tmp_path, monkeypatch, requests):
    monkeypatch.setenv("FAR_DELAY", "0.1")
    copy, size = tmp_path / "cache/tokens.npy", os.path.getsize(far / "bucket/tokens.npy")
    requests()
    command = [sys.executable, "-c", READER, str(copy), str(size)]
    readers = [subprocess.Popen([*command, str(seed), str(COUNT)], stdout=subprocess.PIPE) for seed in range(3)]
    try:
        assert readers[0].stdout.readline() == b"open\n"
        while len((far / ".requests").read_text().splitlines()) < 4:
            time.sleep(0.01)
        readers[0].send_signal(signal.SIGKILL)
        assert [r.wait(timeout=60) for r in readers] == [-signal.SIGKILL, 0, 0]
    finally:
        for reader in readers:
            reader.kill()
            reader.wait()
            reader.stdout.close()
    for seed in (1, 2):
        assert np.array_equal(np.load(f"{copy}.{seed}.npy"), tokens)
    assert len(set(requests("read"))) == 11
    assert np.array_equal(open_as(tmp_path)[0:COUNT], tokens) and not requests("read")
