from tools import bench_images


def test_a_row_for_each_kind_of_picture(monkeypatch):
    monkeypatch.setattr(bench_images, "JPEGS", 4)
    monkeypatch.setattr(bench_images, "SIDES", (60, 80))
    monkeypatch.setattr(bench_images, "rate", lambda images, f=bench_images.rate: f(images, 0.0))
    rows = list(bench_images.rows(2))
    assert len(rows) == 5 and "JPEG of 80 x 60" in rows[-1]["what"]
    assert all(len(row["all"]) == 2 and min(row["all"]) > 0 for row in rows)
