"""TensorBoard's files: `train/report_test.py` drives them through a whole run."""

import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from aether.events import TensorBoard


def read(folder):
    """Return [(step, tag, value or "start")] of all files, in the order of their names."""
    found = []
    for path in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.HasField("session_log"):
                found.append((event.step, "start", None))
            found += [(event.step, v.tag, round(v.simple_value, 6)) for v in event.summary.value]
    return found


def test_a_board_without_events_makes_no_files(tmp_path):
    board = TensorBoard(tmp_path / "tensorboard", 0)
    board.flush()
    board.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("start", [2, None])
def test_only_a_run_that_goes_on_makes_tensorboard_forget(tmp_path, start):
    for first, step in ((0, 5), (start, 3)):
        board = TensorBoard(tmp_path / "tensorboard", first)
        board.scalars(step, 0.0, "train", {"loss": step / 2, "none": None})
        board.close()
    begun = [(3, "start", None)] if start is not None else []
    assert read(tmp_path / "tensorboard") == [(5, "train/loss", 2.5), *begun, (3, "train/loss", 1.5)]
