from types import SimpleNamespace

import pytest

from aether.errors import InputError
from tools import bench_images


def options(**flags):
    return SimpleNamespace(**(dict(config="", override=[], backend=None, memory=1.0, rounds=2) | flags))


def test_the_loader_stands_beside_the_step_that_it_feeds(monkeypatch):
    monkeypatch.setattr(bench_images, "loaded", lambda batches, ahead, f=bench_images.loaded: f(batches, ahead, 0.0))
    pytest.importorskip("sklearn")
    small = ["model.stages=1", "model.width=4", "data.batch_size=16"]
    (row,) = bench_images.rows(options(config="configs/digits.py", override=small))
    assert row["what"].endswith("of the aether_resnet's step, digits") and len(row["all"]) == 2
    low, high = sorted(row["all"])
    assert min(row["loader"], row["step"]) > 0 and row["ratio"] == pytest.approx((low + high) / 2)


def test_what_the_loader_has_read_ahead_is_not_counted(monkeypatch):
    now, made = [0.0], []

    def batches():
        while True:
            made.append(now[0])
            now[0] += 0.0 if len(made) <= 4 else 0.5
            yield dict(labels=[0] * 10)

    monkeypatch.setattr(bench_images.time, "perf_counter", lambda: now[0])
    assert bench_images.loaded(batches(), 3, 1.0) == 20.0 and len(made) == 6


def test_texts_are_no_images():
    with pytest.raises(InputError, match="takes a config of images, and configs/quickstart.py is of aether"):
        list(bench_images.rows(options(config="configs/quickstart.py")))


def test_a_row_for_each_kind_of_picture(monkeypatch):
    monkeypatch.setattr(bench_images, "JPEGS", 4)
    monkeypatch.setattr(bench_images, "SIDES", (60, 80))
    monkeypatch.setattr(bench_images, "rate", lambda images, f=bench_images.rate: f(images, 0.0))
    rows = list(bench_images.rows(options()))
    assert len(rows) == 5 and "JPEG of 80 x 60" in rows[-1]["what"]
    assert all(len(row["all"]) == 2 and min(row["all"]) > 0 for row in rows)
