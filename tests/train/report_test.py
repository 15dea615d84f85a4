"""What a run tells: exact metrics over restarts, progress on and off a terminal, TensorBoard, W&B, curves."""

import errno
import fcntl
import importlib.util
import io
import json
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
from PIL import Image

from aether.errors import InputError, StorageError
from aether.train import report
from aether.train.report import Console, Reporter, finished
from aether.workdir import Workdir

CONFIG = {"data": {"batch_size": 4, "context": 8}}
PER_STEP = 32


@pytest.fixture
def reporter(tmp_path):
    """Make reporters of one run folder; those that are left open are closed."""
    made = []

    def make(start_step=0, **kwargs):
        kwargs = dict(total_steps=100, name="test", config=CONFIG, per_step=PER_STEP, stream=io.StringIO()) | kwargs
        made.append(Reporter(kwargs.pop("workdir", None) or Workdir(str(tmp_path)), start_step=start_step, **kwargs))
        return made[-1]

    yield make
    for one in made:
        one.close()


def values(step):
    return {"loss": 3 / (step + 1), "learning_rate": 1e-3, "tokens_per_second": 1000.0, "mfu": None}


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder):
    """Read TensorBoard's event files in the order in which they were begun."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def test_lines_hold_step_split_and_exact_values(reporter, tmp_path):
    r = reporter()
    numbers = {"loss": 0.1 + 0.2, "grad_norm": np.float32(1) / 3, "tokens": 7, "tiny": 5e-324, "mfu": None}
    r.train(1, numbers)
    (line,) = lines(tmp_path)  # written at once, before any flush
    assert line == {"step": 1, "split": "train"} | {k: v if v is None else float(v) for k, v in numbers.items()}
    assert line["loss"] == 0.30000000000000004 and np.float32(line["grad_norm"]) == np.float32(1) / 3
    assert isinstance(line["tokens"], int)


def test_numbers_that_are_not_finite_stay_json(reporter, tmp_path):
    r = reporter()
    r.train(1, {"loss": math.nan, "grad_norm": math.inf, "learning_rate": 1.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert lines(tmp_path)[0] == {
        "step": 1,
        "split": "train",
        "loss": None,
        "grad_norm": None,
        "learning_rate": 1.0,
        "nonfinite": ["loss", "grad_norm"],
    }


def test_a_restart_drops_torn_and_later_lines_and_keeps_the_others_as_bytes(reporter, tmp_path):
    r = reporter()
    for step in range(1, 6):
        r.train(step, values(step))
    r.validation(4, "validation", values(4))
    r.close()
    path = tmp_path / "metrics.jsonl"
    before = path.read_bytes().splitlines(keepends=True)
    with path.open("ab") as f:
        f.write(b'{"step": 3, "split": "train", "lo')
    again = reporter(start_step=4)
    assert path.read_bytes() == b"".join(before[:4] + before[5:])
    assert again.has(4, "validation") and again.has(4, "train")
    assert not again.has(5, "train") and not again.has(2, "validation") and not again.has(4, "other")
    again.train(5, values(5))
    assert [x["step"] for x in lines(tmp_path) if x["split"] == "train"] == [1, 2, 3, 4, 5]


def test_an_untorn_file_is_not_rewritten(reporter, tmp_path):
    r = reporter()
    r.train(1, values(1))
    r.close()
    inode = (tmp_path / "metrics.jsonl").stat().st_ino
    reporter(start_step=1).close()
    assert (tmp_path / "metrics.jsonl").stat().st_ino == inode


def test_other_processes_write_nothing_but_know_what_they_are_told(reporter, tmp_path):
    first = reporter()
    first.validation(2, "validation", values(2))
    first.close()
    before = sorted(p.name for p in tmp_path.rglob("*"))
    stream = io.StringIO()
    second = reporter(workdir=Workdir(str(tmp_path), primary=False), start_step=2, primary=False, stream=stream)
    assert not second.has(2, "validation"), "its view of the disk may lag behind"
    second.tell(2, ["validation"])
    assert second.has(2, "validation") and not second.has(3, "validation")
    second.validation(3, "validation", values(3))
    second.train(3, values(3))
    second.sample(3, "x")
    second.curves()
    second.flush()
    assert second.has(3, "validation") and stream.getvalue() == ""
    assert sorted(p.name for p in tmp_path.rglob("*")) == before and len(lines(tmp_path)) == 1


def test_a_full_disk_is_a_storage_error_and_the_partial_line_is_dropped_later(reporter, tmp_path):
    r = reporter()
    r.train(1, values(1))
    real = r._metrics._file

    class Full:
        def write(self, line):
            if len(line) < 20:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real.write(line[:-10])

    r._metrics._file = Full()
    with pytest.raises(StorageError, match=r"metrics\.jsonl: disk full"):
        r.train(2, values(2))
    r._metrics._file = real
    r.close()
    reporter(start_step=2)
    assert [line["step"] for line in lines(tmp_path)] == [1]


def test_flush_syncs_the_file(reporter, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), real(fd))[1])
    r = reporter()
    r.train(1, values(1))
    assert r._metrics._file.fileno() not in synced
    r.flush()
    assert r._metrics._file.fileno() in synced


def test_a_remote_run_goes_on_from_another_machine(reporter, monkeypatch, tmp_path):
    store = fsspec.filesystem("memory").store
    store.clear()
    monkeypatch.setenv("AETHER_CACHE", str(tmp_path / "one"))
    one = reporter(workdir=Workdir("memory://bucket/run"))
    one.train(1, values(1))
    one.flush()
    assert store["/bucket/run/metrics.jsonl"].getvalue().count(b"\n") == 1  # when flush returns, it is there
    one.train(2, values(2))
    one.curves()
    one.close()
    assert any("tensorboard/events" in name for name in store) and "/bucket/run/curves.png" in store

    monkeypatch.setenv("AETHER_CACHE", str(tmp_path / "two"))
    two = reporter(workdir=Workdir("memory://bucket/run"), start_step=1)
    assert two.has(1, "train") and not two.has(2, "train")
    two.train(2, values(2))
    two.close()
    written = store["/bucket/run/metrics.jsonl"].getvalue().decode().splitlines()
    assert [json.loads(line) for line in written] == [{"step": s, "split": "train"} | values(s) for s in (1, 2)]
    assert sum("tensorboard/events" in name for name in store) == 2


def test_tensorboard_has_each_value_and_forgets_what_a_restart_repeats(reporter, tmp_path):
    r = reporter()
    for step in (1, 2, 3):
        r.train(step, values(step))
    r.validation(2, "held-out", {"loss": 1.5})
    r.sample(2, "def <main>")
    r.close()
    found = events(tmp_path)
    scalars = {(e.step, v.tag): v.simple_value for e in found for v in e.summary.value if v.tag.endswith("loss")}
    expected = {(s, "train/loss"): np.float32(3 / (s + 1)) for s in (1, 2, 3)} | {(2, "held-out/loss"): 1.5}
    assert scalars == expected
    assert not any(v.tag == "train/mfu" for e in found for v in e.summary.value)
    texts = [v.tensor.string_val[0].decode() for e in found for v in e.summary.value if v.tag.startswith(("s",))]
    assert texts == ["<pre>def &lt;main&gt;</pre>"]

    again = reporter(start_step=2)
    again.train(3, values(3))
    again.close()
    marks = [e for e in events(tmp_path) if e.HasField("session_log")]
    assert [(m.step, m.session_log.status) for m in marks] == [(3, 1)]  # START
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_lines_where_there_is_no_terminal(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(report, "time", SimpleNamespace(monotonic=lambda: now[0]))
    stream = io.StringIO()
    console = Console(stream, 100, 500)
    for step in range(1, 101):
        console.progress(step, values(step) | {"mfu": 0.5, "accuracy": 0.1})
        now[0] += 1.0
    shown = stream.getvalue().splitlines()
    assert [int(re.match(r"step (\d+)/100 ", line).group(1)) for line in shown] == [*range(1, 100, 10), 100]
    assert shown[0] == "step 1/100  loss 1.5000  lr 1.00e-03  1k tokens/s  MFU 50.0%  ETA 0:00:50"  # 500 tokens a step
    assert shown[1].endswith("ETA 0:01:29") and shown[-1].endswith("ETA 0:00:00")


@pytest.mark.parametrize("columns", [0, 120])
def test_bar_on_a_terminal(reporter, columns):
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 0, columns, 0, 0))
    seen = b""

    def read():
        nonlocal seen
        while not seen.endswith(b"THE END\r\n"):
            seen += os.read(parent, 10_000)

    thread = threading.Thread(target=read)
    thread.start()
    with open(child, "w") as stream:
        r = reporter(stream=stream, total_steps=50)
        for step in range(1, 51):
            r.train(step, values(step) | {"mfu": 0.25})
            time.sleep(0.01)
            if step == 20:
                r.say("a line of log")
        r.close()
        stream.write("THE END\n")
        stream.flush()
        thread.join(10)
    os.close(parent)
    screen = seen.decode()
    assert "\ra line of log\r\n" in re.sub(r" +\r", "\r", screen)
    bars = re.findall(r"step (\d+)/50 \|[^|]*\| loss (\S+)  lr 1.00e-03  1k tokens/s  MFU 25.0%  ETA 0:00:0\d", screen)
    assert {int(step) for step, _ in bars} >= {1, 50} and 3 <= len({step for step, _ in bars}) < 30
    assert all(float(loss) == pytest.approx(3 / (int(step) + 1), abs=1e-4) for step, loss in bars)


def test_text_for_people(reporter):
    stream = io.StringIO()
    r = reporter(stream=stream)
    loss = 1.25
    r.validation(5, "validation", {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": 1.8, "accuracy": 0.5})
    r.sample(5, "a\nb")
    assert stream.getvalue().splitlines() == [
        "step 5  validation: loss 1.2500  perplexity 3.49  bits/byte 1.8000  accuracy 50.00%",
        "step 5  sample:",
        "  | a",
        "  | b",
    ]


def test_finished(reporter, tmp_path):
    r = reporter()
    for step in (1, 2):
        r.train(step, values(step))
        r.validation(step, "validation", {"loss": step / 8})
    r.close()
    assert finished(Workdir(str(tmp_path), primary=False)) == "This run is finished: step 2, validation loss 0.2500"


def test_curves_are_drawn_also_from_lines_of_before_a_restart(reporter, tmp_path, monkeypatch):
    r = reporter()
    for step in range(1, 31):
        r.train(step, values(step))
    r.validation(30, "validation", values(30))
    r.close()  # draws at the end by itself
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (1600, 1000)
    drawn = []
    monkeypatch.setattr(report, "draw", lambda curves, *rest: (drawn.append((curves, rest)), b"png")[1])
    again = reporter(start_step=20, parameters=1_240_000)
    again.train(21, values(21))
    again.curves()
    again.close()
    ((curves, rest),) = drawn
    assert list(curves["train"].steps) == list(range(1, 22)) and "validation" not in curves
    assert rest == ("test  ·  1.24M parameters", PER_STEP, "tokens")
    assert (tmp_path / "curves.png").read_bytes() == b"png"


def test_drawing_does_not_hold_up_training_and_requests_are_merged(reporter, monkeypatch):
    release, begun, drawn = threading.Event(), threading.Event(), []

    def slow(curves, *_):
        begun.set()
        release.wait(10)
        drawn.append(curves["train"].steps[-1])
        return b""

    monkeypatch.setattr(report, "draw", slow)
    r = reporter()
    r.train(1, values(1))
    r.curves()
    assert begun.wait(10)
    for step in (2, 3, 4):
        r.train(step, values(step))
        r.curves()
    assert drawn == []  # the training thread got here while the first picture was being drawn
    release.set()
    r.close()
    assert drawn == [1, 4]


def test_a_failing_picture_is_a_warning(reporter, tmp_path, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(report, "draw", lambda *_: 1 / 0)
    r = reporter(stream=stream)
    r.train(1, values(1))
    r.curves()
    r.train(2, values(2))
    r.close()
    assert "warning: curves.png failed, training goes on without it: ZeroDivisionError" in stream.getvalue()
    assert len(lines(tmp_path)) == 2 and len(events(tmp_path)) == 3


def test_a_failing_board_is_one_warning(reporter, tmp_path, monkeypatch):
    stream = io.StringIO()
    r = reporter(stream=stream)
    (tmp_path / "tensorboard").write_text("in the way")
    for step in (1, 2, 3):
        r.train(step, values(step))
    r.close()
    assert stream.getvalue().count("warning: TensorBoard failed") == 1 and len(lines(tmp_path)) == 3


def test_train_costs_little(reporter):
    r = reporter(total_steps=10_000)
    took = []
    for step in range(1, 1001):
        start = time.perf_counter()
        r.train(step, values(step))
        took.append(time.perf_counter() - start)
    assert np.median(took) < 0.3e-3


def test_wandb_that_is_not_installed_names_the_extra(reporter, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r'train\.wandb is \'p\' but wandb is not installed; pip install "aether\[wandb\]"'
    ):
        reporter(wandb="p")


@pytest.mark.filterwarnings("default")
def test_wandb_offline_goes_on_with_the_same_run(reporter, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    r = reporter(wandb="project")
    r.train(1, values(1))
    r.validation(1, "validation", values(1))
    r.sample(1, "text")
    r.train(2, values(2))
    r.close()
    saved = json.loads((tmp_path / "wandb.json").read_text())
    assert saved["project"] == "project" and saved["logged"] == -1

    again = reporter(wandb="project", start_step=1)
    logged = []
    real = again._wandb._run.log
    monkeypatch.setattr(again._wandb._run, "log", lambda x: (logged.append(x), real(x))[1])
    again.train(2, values(2))  # W&B has it from before
    again.train(3, values(3))
    again.close()
    assert json.loads((tmp_path / "wandb.json").read_text()) == saved | {"logged": 2}
    assert [x["step"] for x in logged] == [3] and logged[0]["train/loss"] == values(3)["loss"]
    files = list((tmp_path / "wandb").glob(f"offline-run-*-{saved['id']}/*.wandb"))
    end = time.monotonic() + 30  # W&B writes them in a process of its own
    while not all(f.stat().st_size > 500 for f in files) and time.monotonic() < end:
        time.sleep(0.1)
    assert files and all(f.stat().st_size > 500 for f in files)


def test_nothing_heavy_is_imported_by_the_module():
    heavy = ("jax", "matplotlib", "tensorboardX", "wandb", "tqdm", "fsspec")
    code = f"import aether.train.report, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_samples_are_kept_once_a_step_over_restarts(reporter, tmp_path):
    r = reporter()
    for step in (2, 4, 6):
        r.sample(step, f"text <{step}>")
    r.close()
    again = reporter(start_step=4)
    for step in (4, 6):
        again.sample(step, f"again {step}")
    again.close()
    kept = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["text"]) for line in kept] == [(2, "text <2>"), (4, "text <4>"), (6, "again 6")]


def test_a_run_without_samples_has_no_file_of_them(reporter, tmp_path):
    r = reporter()
    r.train(1, values(1))
    r.close()
    assert (tmp_path / "metrics.jsonl").exists() and not (tmp_path / "samples.jsonl").exists()
