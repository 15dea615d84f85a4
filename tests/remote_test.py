"""Remote files: which failures are tried again, ranges as a stream, listings and versions."""

import datetime
import io
import sys

import pytest

from aether import remote
from aether.errors import InputError, StorageError

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def memory(monkeypatch):
    """The empty file system behind memory://, and no waiting between tries."""
    fs = fsspec.filesystem("memory")
    monkeypatch.setattr(type(fs), "store", {})
    monkeypatch.setattr(type(fs), "pseudo_dirs", [""])
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0, 0.0))
    return fs


class Failing:
    """A call that raises its errors one after the other, and then returns."""

    def __init__(self, *errors):
        self.errors, self.calls = list(errors), 0

    def __call__(self):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


class NoCredentialsError(Exception):
    pass


def test_a_lost_connection_is_tried_again(memory):
    call = Failing(ConnectionResetError("gone"), TimeoutError())
    assert remote.attempt("s3://b/x", "read", call) == "done" and call.calls == 3


@pytest.mark.parametrize(
    ("error", "kind", "calls", "say"),
    [
        (ConnectionResetError("gone\n away."), StorageError, 4, "s3://b/x cannot be read: ConnectionResetError: gone"),
        (NoCredentialsError("Unable to locate"), StorageError, 1, "NoCredentialsError: Unable .* your credentials"),
        (PermissionError("no"), StorageError, 1, "cannot be read: PermissionError: no; check"),
        (OSError("Forbidden: b/x"), StorageError, 1, "Forbidden"),
        (FileNotFoundError("b/x"), remote.MissingError, 1, "s3://b/x does not exist"),
        (ValueError("odd"), InputError, 1, "s3://b/x is not an address .*odd"),
    ],
)
def test_what_lasts_is_said_at_once_and_in_one_line(memory, error, kind, calls, say):
    call = Failing(*[error] * 9)
    with pytest.raises(kind, match=say) as found:
        remote.attempt("s3://b/x", "read", call)
    assert call.calls == calls and "\n" not in str(found.value)


def test_no_try_begins_after_the_patience(memory, monkeypatch):
    times = iter([0.0, 3.0, remote.PATIENCE + 1.0])
    monkeypatch.setattr(remote.time, "monotonic", lambda: next(times))
    call = Failing(*[ConnectionError()] * 9)
    with pytest.raises(StorageError):
        remote.attempt("s3://b/x", "read", call)
    assert call.calls == 2


def test_a_bucket_that_does_not_exist(memory):
    with pytest.raises(InputError, match="s3://b/x cannot be written, because its bucket does not exist"):
        remote.attempt("s3://b/x", "write", Failing(FileNotFoundError()))


def test_a_stream_is_the_object_from_any_position(memory, monkeypatch, rng):
    content = rng.bytes(10_000)
    remote.write("memory://b/x", content[:4000], memoryview(content[4000:]))
    monkeypatch.setattr(remote, "BLOCK", 777)
    twin = io.BytesIO(content)
    with remote.open_stream("memory://b/x") as stream:
        for count in (10, 5000, 3, -1):
            assert stream.read(count) == twin.read(count)
        for place in rng.integers(0, 10_000, 20).tolist():
            assert stream.seek(place) == twin.seek(place) and stream.read(100) == twin.read(100)
        assert stream.seek(-8, io.SEEK_END) == 9_992 and len(stream.read()) == 8 and stream.read(1) == b""
    asked = []
    monkeypatch.setattr(remote, "read_range", lambda *a: asked.append(a) or content[a[-2] : a[-1]])
    assert remote.open_stream("memory://b/x").read() == content and len(asked) == -(-10_000 // 777)
    remote.write("memory://b/empty")
    with remote.open_stream("memory://b/empty") as stream:
        assert stream.read() == b""


def test_an_answer_that_is_cut_off_is_asked_for_again(memory, monkeypatch):
    remote.write("memory://b/x", b"0123456789")
    whole, cuts = type(memory).cat_file, [4, 9]

    def cut(self, path, start=None, end=None, **kwargs):
        return whole(self, path, start=start, end=end)[: cuts.pop() if cuts else None]

    monkeypatch.setattr(type(memory), "cat_file", cut)
    assert remote.open_stream("memory://b/x").read() == b"0123456789" and not cuts
    cuts[:] = [4] * 9
    with pytest.raises(StorageError, match="4 of the 10 bytes from 0 on arrived"):
        remote.open_stream("memory://b/x").read()


def test_listings(memory):
    for name in ("a.txt", "b.md", "in/c.txt", "in/deep/d.txt"):
        remote.write(f"memory://b/{name}", name.encode())
    (one,), single = remote.find("memory://b/a.txt")
    assert single and (one.address, one.size) == ("memory://b/a.txt", 5)
    below, single = remote.find("memory://b/in")
    assert not single and [o.address for o in below] == ["memory://b/in/c.txt", "memory://b/in/deep/d.txt"]
    assert [o.address for o in remote.glob("memory://b/*.txt")] == ["memory://b/a.txt"]
    assert len(remote.glob("memory://b/**/*.txt")) == 3 and remote.glob("memory://b/*.nothing") == []
    with pytest.raises(remote.MissingError, match="memory://b/none does not exist"):
        remote.find("memory://b/none")
    assert remote.find("memory://b/a.txt")[0] == [one]
    remote.write("memory://b/a.txt", b"other")
    (other,), _ = remote.find("memory://b/a.txt")
    assert other.size == one.size and other.version != one.version


@pytest.mark.parametrize(("address", "driver", "extra"), [("s3://b/r", "s3fs", "s3"), ("gs://b/r", "gcsfs", "gcs")])
def test_a_missing_driver_names_the_extra(address, driver, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, driver, None)
    monkeypatch.setattr(sys.modules["fsspec.registry"], "_registry", {})
    with pytest.raises(InputError, match=rf'{address} needs the driver .* pip install "aether\[{extra}\]"'):
        remote.connect(address)


def test_an_unknown_protocol():
    with pytest.raises(InputError, match="nosuch://x/y is not an address .*nosuch.* give gs://"):
        remote.connect("nosuch://x/y")


def test_versions_by_what_is_reported():
    assert remote.version(dict(size=3, ETag='"ab"', mtime=5)) == remote.version(dict(size=3, ETag="ab")) == "3 ab"
    when = datetime.datetime(2026, 1, 1)
    assert remote.version(dict(size=3)) == "3 " and remote.version(dict(size=3, created=when)) != "3 "
