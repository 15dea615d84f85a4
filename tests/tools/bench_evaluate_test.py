from types import SimpleNamespace

import pytest

from tools import bench_evaluate


def test_the_task_stands_beside_the_forward_pass():
    small = ["model.layers=1", "model.heads=1", "model.width=8", "data.context=32", "data.batch_size=4"]
    options = SimpleNamespace(config="", override=small, backend=None, memory=1.0, rounds=3, tokens=3000)
    (row,) = bench_evaluate.rows(options)
    assert row["what"].endswith("configs/quickstart.py") and len(row["all"]) == 3
    assert row["ratio"] == pytest.approx(sorted(row["all"])[1]) and min(row["documents"], row["forward"]) > 0
