"""`launch.local`: what it starts, how it ends it. Small programs stand for training, except in the slow tests."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from aether.errors import InputError
from aether.testing import tiny_text
from launch import local

ROOT = Path(__file__).parents[2]
# What each process does, by its number; `tell` leaves its pid where the test finds it.
PROGRAM = """
import os, signal, sys, time
rank, tries = int(os.environ["JAX_PROCESS_ID"]), int(sys.argv[1]) if len(sys.argv) > 1 else 0
def tell():
    with open(f"pid{rank}.new", "w") as file:
        file.write(str(os.getpid()))
    os.rename(f"pid{rank}.new", f"pid{rank}")
def attempt():
    with open(f"tries{rank}", "a+") as file:
        file.write("x"); file.seek(0)
        return len(file.read())
"""


@pytest.fixture
def start(tmp_path):
    """A function (program, *flags) -> a running `launch.local` of it; what it leaves behind is ended, and an error."""
    started = []

    def start(program: str, *flags: str, rest=()) -> subprocess.Popen:
        (tmp_path / "program.py").write_text(PROGRAM + program)
        env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "launch.local", *flags, "--module=program", "--", *rest]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(subprocess.Popen(command, cwd=tmp_path, env=env, **pipes))
        return started[-1]

    yield start
    left = [int(path.read_text()) for path in tmp_path.glob("pid?")]
    for process in started:
        process.kill()
        process.communicate()
    deadline = time.monotonic() + 10
    while (alive := [pid for pid in left if runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    assert not alive, "launch.local left processes behind"


def runs(pid: int) -> bool:
    """Return whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def pid_of(tmp_path: Path, rank: int, job: subprocess.Popen) -> int:
    """Wait until a process has told its pid."""
    deadline = time.monotonic() + 30
    while not (tmp_path / f"pid{rank}").exists():
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()
        time.sleep(0.02)
    return int((tmp_path / f"pid{rank}").read_text())


def ended(job: subprocess.Popen) -> tuple[int, str, str]:
    out, err = job.communicate(timeout=300)
    return job.returncode, out, err


def test_lines_and_the_common_exit_code(start):
    job = start("print('out', rank)\nsys.stderr.write(f'err {rank}')\nsys.exit(3)", "--processes=2")
    code, out, err = ended(job)
    assert code == 3 and sorted(out.splitlines()) == ["[1] out 1", "out 0"]
    assert "err 0" in err and "[1] err 1\n" in err and "restart" not in err


def test_arguments_and_variables_reach_the_processes(start):
    words = "[*sys.argv[1:], *(os.environ[k] for k in ('JAX_NUM_PROCESSES', 'JAX_NUM_CPU_DEVICES'))]"
    shown = f"os.write(1, (' '.join({words}) + chr(10)).encode())"  # a line at once, lest two be mixed
    code, out, err = ended(start(shown, "--processes=2", "--devices=3", rest=("7", "--config=x y")))
    assert code == 0 and sorted(out.splitlines()) == ["7 --config=x y 2 3", "[1] 7 --config=x y 2 3"], err


def test_when_one_is_killed_all_end_a_stopped_one_too(start, tmp_path):
    job = start("tell()\ntime.sleep(1000)", "--processes=3")
    pids = [pid_of(tmp_path, rank, job) for rank in range(3)]
    os.kill(pids[1], signal.SIGSTOP)
    os.kill(pids[2], signal.SIGKILL)
    code, _, err = ended(job)
    assert code == 1 and "process 2 was ended by SIGKILL, so all were ended; that was the only try." in err


def test_one_fails_and_the_others_may_say_why(start, monkeypatch):
    code, out, err = ended(start("time.sleep(rank)\nprint('last words')\nsys.exit(74)", "--processes=2"))
    assert code == 74 and out.count("last words") == 2 and "all processes ended with exit code 74" in err


def test_a_failure_is_tried_again_with_a_new_port(start, tmp_path):
    """Process 1 kills itself twice; process 0, which may be ended before it does anything, waits for its third try."""
    program = "n = attempt() if rank else 0\nprint(os.environ['JAX_COORDINATOR_ADDRESS'])\n"
    program += "if rank and n < 3:\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    program += (
        "while not rank and not (os.path.exists('tries1') and len(open('tries1').read()) == 3):\n    time.sleep(0.02)"
    )
    code, out, err = ended(start(program, "--processes=2", "--restarts=2"))
    assert code == 0 and "restart 1 of 2 in 1 s" in err and "restart 2 of 2 in 2 s" in err, err
    assert (tmp_path / "tries1").read_text() == "xxx"
    assert len({line.removeprefix("[1] ") for line in out.splitlines()}) >= 1


@pytest.mark.parametrize("code", [2, 3, 75])
def test_some_ends_are_for_good(start, tmp_path, code):
    assert ended(start(f"attempt()\nsys.exit({code})", "--processes=2", "--restarts=5"))[0] == code
    assert (tmp_path / "tries0").read_text() == "x"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_and_waited_for(start, tmp_path, number):
    program = "def stop(n, f):\n    time.sleep(0.5 * rank)\n    print('saved', n)\n    sys.exit(75)\n"
    program += f"signal.signal({int(number)}, stop)\ntell()\ntime.sleep(1000)"
    job = start(program, "--processes=2", "--restarts=5")
    for rank in range(2):
        pid_of(tmp_path, rank, job)
    job.send_signal(number)
    code, out, _ = ended(job)
    assert code == 75 and sorted(out.splitlines()) == [f"[1] saved {int(number)}", f"saved {int(number)}"]


def test_nothing_outlives_it(start, tmp_path):
    """The fixture looks whether the processes are gone."""
    job = start("tell()\ntime.sleep(1000)", "--processes=2")
    pids = [pid_of(tmp_path, rank, job) for rank in range(2)]
    job.kill()
    job.communicate()
    assert len(set(pids)) == 2


def test_dry_run_prints_what_it_would_do(capsys, tmp_path):
    file = tmp_path / "a b.py"
    file.write_text("from aether.config import default_config as get_config\n")
    assert local.run(["--processes=2", "--devices=4", "--dry_run", "--", f"--config={file}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for index, line in enumerate(lines):
        assert line.startswith("JAX_COORDINATOR_ADDRESS=127.0.0.1:")
        assert f"JAX_NUM_PROCESSES=2 JAX_PROCESS_ID={index} JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4" in line
        assert line.endswith(f"{sys.executable} -m launch.train '--config={file}'")
    assert local.run(["--dry_run", "--", f"--config={file}", "--config.train.steps=-1"]) == 2
    assert "train.steps" in capsys.readouterr().err


def test_gpus_are_shared_out(tmp_path):
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert local.visible_gpus({}, tmp_path) == ["0", "1", "2"]
    four = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    assert local.devices(2, 0, four) == [{"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "6,7"}]
    assert local.devices(1, 2, four) == [{"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}]
    assert local.devices(1, 0, {**four, "JAX_PLATFORMS": "cpu"})[0]["JAX_NUM_CPU_DEVICES"] == "1"
    assert local.devices(1, 0, {"CUDA_VISIBLE_DEVICES": ""})[0]["JAX_PLATFORMS"] == "cpu"
    with pytest.raises(InputError, match="--processes is 3 and this machine shows 4 GPUs"):
        local.devices(3, 0, four)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--processes=0"], "--processes is '0'"),
        (["--processes=2", "--config=x.py"], "There is no flag --config"),
        (["--processes=2"], "nothing follows --"),
        (
            ["--processes=2", "--module=nope.nope", "--", "x"],
            "--module is 'nope.nope', which this Python does not find.",
        ),
    ],
)
def test_wrong_arguments(argv, said, capsys):
    assert local.run(argv) == 2 and said in capsys.readouterr().err


CONFIG = """
from aether.config import default_config
def get_config():
    config = default_config()
    config.update(VALUES)
    return config
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The path of a config of a run of seconds."""
    folder = tmp_path_factory.mktemp("config")
    values = dict(
        model=dict(layers=1, heads=2, width=16, dtype="float32"),
        data=dict(path=str(tiny_text(folder, 600)), context=16, batch_size=8, cache_dir=str(folder / "cache")),
        optim=dict(learning_rate=1e-2, warmup_steps=2, schedule_steps=100),
        train=dict(steps=6, eval_every=0, sample_tokens=0),
        faults=dict(heartbeat_timeout_seconds=20),
    )
    path = folder / "tiny.py"
    path.write_text(CONFIG.replace("VALUES", repr(values)))
    return path


@pytest.fixture
def train(config):
    """A function (workdir, *flags) -> a running `launch.local` of training, which does not outlive the test."""
    started = []

    def train(workdir: Path, *flags: str, processes: int = 2, more=()) -> subprocess.Popen:
        command = [sys.executable, "-m", "launch.local", f"--processes={processes}", *more, "--"]
        command += [f"--config={config}", f"--workdir={workdir}", *flags]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        env = {**os.environ, "JAX_PLATFORMS": "cpu"}
        started.append(subprocess.Popen(command, cwd=ROOT, env=env, **pipes))
        return started[-1]

    yield train
    for job in started:
        job.kill()
        job.communicate()


def losses(workdir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["split"] == "train"}


def test_a_mesh_that_does_not_fit_is_told_once(train, tmp_path):
    job = train(tmp_path / "run", "--config.mesh.data=3")
    code, out, err = ended(job)
    assert code == 2, err
    assert err.count("error: ") == 1 and "mesh" in err and "[1] error" not in err and "Traceback" not in err


@pytest.mark.slow
def test_two_processes_train_as_one_does(train, tmp_path):
    for job in (train(tmp_path / "1", processes=1), train(tmp_path / "2")):
        code, _, err = ended(job)
        assert code == 0, err
    expected, found = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert sorted(expected) == [1, 2, 3, 4, 5, 6]
    assert all(abs(found[step] / expected[step] - 1) < 1e-5 for step in expected), (found, expected)


@pytest.mark.slow
def test_a_kill_and_a_signal(train, tmp_path):
    """SIGKILL of one: all start again, from the last checkpoint. SIGTERM: all save and end with 75."""
    flags = ("--config.train.steps=1000000", "--config.checkpoint.every=50", "--config.train.log_every=50")
    job = train(tmp_path / "run", *flags, more=("--restarts=1",))
    wait_for(tmp_path / "run", 100, job)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    wait_for(tmp_path / "run", max(losses(tmp_path / "run")) + 200, job)
    job.send_signal(signal.SIGTERM)
    code, _, err = ended(job)
    assert code == 75, err
    assert "process 1 was ended by SIGKILL, so all were ended; restart 1 of 1" in err and "going on from step" in err
    assert err.count("saved at step") == 1


def wait_for(workdir: Path, step: int, job: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not (workdir / "metrics.jsonl").exists() or max(losses(workdir), default=0) < step:
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()
        time.sleep(0.1)


def test_one_that_was_killed_is_named_even_if_another_had_ended_when_somebody_looked():
    codes = iter([[None, None], [1, -9]])
    now: list = [None, None]
    job = local.Job([], [], local.Signals())
    job._children = [SimpleNamespace(index=i, code=lambda i=i: now[i]) for i in range(2)]

    def sleep(_):
        now[:] = next(codes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local.time, "sleep", sleep)
        first = job._first()
    assert local._verdict(first, [1, -9]) == (1, "process 1 was ended by SIGKILL, so all were ended")
