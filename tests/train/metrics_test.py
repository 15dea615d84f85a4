"""The file of metrics by itself; `report_test.py` drives it through a whole run."""

import json
import math

import numpy as np
import pytest

from aether.train.metrics import Metrics


@pytest.mark.parametrize(
    "torn", [b"{}", b'{"step": 1, "split": "train"}', b"\0\0\0\n", b"[1]\n", b'{"step": "1"}\n', b"\xff\n"]
)
def test_torn_ends(tmp_path, torn):
    path = tmp_path / "m"
    path.write_bytes(b'{"step": 0, "split": "v", "loss": 1.0}\n' + torn)
    metrics = Metrics(path, start_step=9, write=True)
    metrics.close()
    assert metrics.dropped == 1 and metrics.has(0, "v") and path.read_bytes().count(b"\n") == 1


def test_what_is_written_reads_back_equal(tmp_path):
    written = Metrics(tmp_path / "m", write=True)
    for step in range(1, 50):
        written.add(step, "train", {"loss": np.float32(1) / step, "learning_rate": 0.1 * step})
    written.add(7, "held-out", {"loss": math.nan, "note": "ⵟ"})
    written.close()
    read = Metrics(tmp_path / "m")
    assert read.curves["train"] == written.curves["train"] and read.furthest == 49
    assert list(read.curves["train"].loss) == [float(np.float32(1) / step) for step in range(1, 50)]
    assert math.isnan(read.curves["held-out"].loss[0]) and math.isnan(read.curves["held-out"].rate[0])
    assert json.loads((tmp_path / "m").read_text().splitlines()[-1])["nonfinite"] == ["loss"]


def test_reading_changes_nothing_and_writes_nothing(tmp_path):
    path = tmp_path / "m"
    Metrics(path).add(1, "train", {"loss": 1.0})
    assert not path.exists()
    path.write_bytes(b'{"step": 3, "split": "v", "loss": 1.0}\n{"st')
    before = path.read_bytes()
    metrics = Metrics(path, start_step=2)
    assert metrics.dropped == 2 and metrics.furthest == 3 and not metrics.has(3, "v") and path.read_bytes() == before


def test_a_copy_of_a_curve_stays_as_it_was(tmp_path):
    metrics = Metrics(tmp_path / "m")
    metrics.add(1, "train", {"loss": 1.0})
    copy = metrics.curves["train"].copy()
    metrics.add(2, "train", {"loss": 2.0})
    assert list(copy.steps) == [1] and list(copy.loss) == [1.0] and len(copy.rate) == 1
    assert metrics.has(2, "train") and not copy.has(2) and not copy.has(0)
