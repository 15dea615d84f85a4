"""The mains as a person starts them, in processes of their own: kills, signals, exit codes, streams."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from aether.arrays import named_leaves
from aether.checkpoint import Checkpoints
from aether.config import CheckpointConfig, MeshConfig, build
from aether.parallel import make_mesh
from aether.train.setup import describe_state

CONFIG = """
from aether.config import default_config

def get_config():
    config = default_config()
    config.model.layers, config.model.heads, config.model.width = 1, 2, 32
    config.model.dtype, config.model.dropout = "float32", 0.1
    config.data.path, config.data.context, config.data.batch_size = {text!r}, 64, 32  # slow enough to be hit
    config.data.validation.own = {own!r}
    config.optim.learning_rate, config.optim.warmup_steps = 1e-2, 5
    config.train.steps, config.train.ema = 60, 0.9
    config.train.eval_every, config.train.sample_tokens, config.train.sample_prompt = 10, 8, "the"
    config.checkpoint.every = 4
    return config
"""
ROUGH = {"tokens_per_second", "mfu", "data_wait"}
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config file with a folder of short documents, so that sequences hold several."""
    folder = tmp_path_factory.mktemp("e2e")
    words = "the model reads a line and says what comes next if it can".split()
    choose = random.Random(0)
    for name, count in (("text", 60), ("own", 5)):
        (folder / name).mkdir()
        for i in range(count):
            (folder / name / f"{i}.txt").write_text(" ".join(choose.choices(words, k=choose.randint(3, 30))) + "\n")
    file = folder / "small.py"
    file.write_text(CONFIG.format(text=str(folder / "text"), own=str(folder / "own")))
    return file


class Process:
    """A main in a process of its own, its streams in files."""

    def __init__(self, main: str, folder: Path, *words: str):
        streams = folder.parents[1] / f"streams-{folder.parent.name}"
        streams.mkdir(exist_ok=True)
        self.folder, self.streams = folder, [streams / "out", streams / "err"]
        with self.streams[0].open("w") as out, self.streams[1].open("w") as err:
            command = [sys.executable, "-m", f"launch.{main}", f"--workdir={folder}", *words]
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err)

    def end(self) -> int:
        try:
            return self.process.wait(timeout=300)
        finally:
            self.process.kill()

    @property
    def out(self) -> str:
        return self.streams[0].read_text()

    @property
    def err(self) -> str:
        return self.streams[1].read_text()

    def until(self, condition) -> bool:
        """Wait until the condition holds; False if the process ends before."""
        while self.process.poll() is None:
            if condition():
                return True
            time.sleep(0.001)
        return False

    def saving(self) -> bool:
        checkpoints = self.folder / "checkpoints"
        return checkpoints.is_dir() and any("unfinished-" in name for name in os.listdir(checkpoints))

    def reached(self, step: int) -> bool:
        """Tell whether this process has made the step: until its first line of progress, the lines are of others."""
        return "/60  loss" in self.err and last_step(self.folder) >= step


def train(config: Path, folder: Path, *words: str) -> Process:
    return Process("train", folder, f"--config={config}", *words)


def last_step(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def newest(folder: Path) -> int:
    checkpoints = folder / "checkpoints"
    return max([0, *(int(n) for n in os.listdir(checkpoints) if n.isdecimal())]) if checkpoints.is_dir() else 0


def result(folder: Path) -> tuple[dict, dict]:
    """Return the lines by (step, split), times aside, and the arrays of the last checkpoint by name."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = {(r["step"], r["split"]): {k: v for k, v in r.items() if k not in ROUGH} for r in records}
    assert len(lines) == len(records), "a (step, split) stands there twice"
    config = build(json.loads((folder / "config.json").read_text())["config"])
    _, _, like = describe_state(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    state, _, step = Checkpoints(str(folder / "checkpoints"), CheckpointConfig()).restore(like)
    assert step == config.train.steps == 60
    return lines, {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}


def assert_same(one: tuple[dict, dict], other: tuple[dict, dict]) -> None:
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    for name, array in one[1].items():
        assert array.tobytes() == other[1][name].tobytes(), name


def kill(process: Process) -> None:
    process.process.send_signal(signal.SIGKILL)
    assert process.end() == -signal.SIGKILL


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    process = train(config, folder)
    assert process.end() == 0, process.err
    return folder, result(folder), process


def test_a_run_of_its_own(undisturbed):
    folder, (lines, _), process = undisturbed
    assert process.out == "", "stdout is for results"
    assert {s for s, split in lines if split == "train"} == set(range(1, 61))
    assert {s for s, split in lines if split == "own"} == {10, 20, 30, 40, 50, 60}
    assert lines[60, "train"]["loss"] < lines[1, "train"]["loss"] - 1
    for phase in ("imports", "data", "init", "compile"):
        assert phase in process.err
    assert "  | the" in process.err and "This run is finished: step 60, own loss" in process.err
    assert (folder / "curves.png").stat().st_size > 10_000 and list((folder / "tensorboard").iterdir())


@pytest.mark.slow
def test_killed_and_stopped_and_going_on(config, undisturbed, tmp_path):
    """Kill it while it saves, kill it between, stop it politely, and let it end: nobody can tell."""
    folder = tmp_path / "run"
    process = train(config, folder)
    assert process.until(lambda: process.reached(9) and process.saving()), process.err
    kill(process)
    process, began = train(config, folder), newest(folder)
    assert process.until(lambda: process.reached(began + 10)), process.err
    kill(process)
    process, began = train(config, folder), newest(folder)
    assert process.until(lambda: process.reached(began + 6)), process.err
    process.process.send_signal(signal.SIGTERM)
    assert process.end() == 75, process.err
    saved = newest(folder)
    assert process.err.splitlines()[-1] == (
        f"Stopped by SIGTERM and saved at step {saved} of 60; the same command goes on."
    )
    assert process.out == "" and last_step(folder) == saved < 60
    process = train(config, folder)
    assert process.end() == 0, process.err
    assert f"going on from step {saved} of 60" in process.err
    assert_same(result(folder), undisturbed[1])


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a small tmpfs is not permitted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_a_full_disk(config, small_disk):
    folder = small_disk / "run"
    flags = ["--config.train.eval_every=0", "--config.train.sample_tokens=0", "--config.optim.schedule_steps=60"]
    process = train(config, folder, *flags, "--config.train.steps=4")
    assert process.end() == 0, process.err
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as f, pytest.raises(OSError, match="No space"):
        while True:
            f.write(bytes(4096))
    os.truncate(ballast, ballast.stat().st_size - (40 << 10))  # room for lines and the record, not for a checkpoint
    before = content(folder / "checkpoints")
    process = train(config, folder, *flags, "--config.train.steps=12")
    assert process.end() == 74, process.err
    assert process.out == "" and "Traceback" not in process.err
    assert process.err.splitlines()[-1].startswith("error: ") and "space" in process.err.splitlines()[-1]
    assert content(folder / "checkpoints") == before, "the earlier checkpoint is as it was"
    ballast.unlink()
    process = train(config, folder, *flags, "--config.train.steps=12")
    assert process.end() == 0, process.err
    assert "going on from step 4 of 12" in process.err and newest(folder) == last_step(folder) == 12


def content(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def test_evaluate_and_generate(undisturbed, tmp_path):
    folder, (lines, _), _ = undisturbed
    before = content(folder)
    evaluated, generated = (
        subprocess.Popen(
            [sys.executable, "-m", *words, f"--workdir={folder}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for words in (["launch.evaluate"], ["launch.generate", "--prompt=the li", "--max_tokens=20", "--seed=3"])
    )
    out, err = evaluated.communicate(timeout=300)
    assert evaluated.returncode == 0, err
    scores = json.loads(out.splitlines()[-1])
    assert out.count("\n") == 1 and {"step", "loss", "perplexity", "bits_per_byte", "accuracy", "tokens"} <= set(scores)
    for name, value in lines[60, "own"].items():
        if name != "split":
            assert scores[name] == pytest.approx(value, rel=1e-6), name
    out, err = generated.communicate(timeout=300)
    assert generated.returncode == 0, err
    assert out.startswith("the li") and len(out) > len("the li") + 5
    assert content(folder) == before


@pytest.mark.parametrize("main", ["train", "evaluate", "generate"])
def test_help(main):
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-m", f"launch.{main}", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "--workdir" in done.stdout
    assert time.monotonic() - begin < 30  # 2 s on a machine of one's own


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_kills_at_random_moments(config, undisturbed, tmp_path, seed):
    """Eight kills: during saves, at a random step, and a random while after the start."""
    choose = random.Random(seed)
    folder = tmp_path / "run"
    moments = ["saving"] * 4 + ["steps"] * 3 + ["start"]
    choose.shuffle(moments)
    kills = 0
    for moment in moments:
        process = train(config, folder)
        step = newest(folder) + choose.randint(1, 7)
        if moment == "start":
            time.sleep(choose.uniform(0.5, 4))
        elif moment == "steps":
            process.until(lambda p=process, s=step: p.reached(s))
            time.sleep(choose.uniform(0, 0.03))
        else:
            process.until(lambda p=process, s=step: p.reached(s) and p.saving())
            time.sleep(choose.uniform(0, 0.02))
        if process.process.poll() is None:
            kill(process)
            kills += 1
        else:
            assert process.end() == 0, process.err
    process = train(config, folder)
    assert process.end() == 0, process.err
    assert kills >= 6
    assert_same(result(folder), undisturbed[1])


@pytest.mark.slow
def test_ctrl_c_on_a_terminal_reaches_the_workers_too(config, undisturbed, tmp_path):
    """The terminal sends SIGINT to every process of the group; the readers must not end the run before it is saved."""
    folder = tmp_path / "run"
    folder.mkdir()
    command = [sys.executable, "-m", "launch.train", f"--config={config}", f"--workdir={folder}"]
    for attempt in (1, 2):
        with (tmp_path / f"err{attempt}").open("w+") as err:
            process = subprocess.Popen(
                [*command, "--config.data.workers=2"], cwd=ROOT, stderr=err, stdout=err, start_new_session=True
            )
            try:
                while attempt == 1 and process.poll() is None and last_step(folder) < 8:
                    time.sleep(0.005)
                if attempt == 1:
                    os.killpg(process.pid, signal.SIGINT)
                code = process.wait(timeout=300)
            finally:
                process.kill()
            err.seek(0)
            text = err.read()
        assert "Traceback" not in text, text
        assert code == (75 if attempt == 1 else 0), text
    assert_same(result(folder), undisturbed[1])
