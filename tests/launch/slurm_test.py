"""The SLURM launcher: the script it writes, and a real SLURM of one machine that runs it with two tasks."""

import contextlib
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import cli, jobs, slurm

TRAINING = ["--", "--config=configs/quickstart.py", "--workdir=runs/mine"]


def run(*argv: str) -> int:
    return jobs.run(slurm.main, slurm.FLAGS, slurm.__doc__, list(argv))


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(cli, "prepare_environment", lambda debug: None)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Put an sbatch on PATH that keeps its argv and input, and ends as the test says."""

    def make(out: str = "17", err: str = "", code: int = 0) -> Path:
        program = tmp_path / "bin" / "sbatch"
        program.parent.mkdir(exist_ok=True)
        text = f"""#!{sys.executable}
import json, pathlib, sys
pathlib.Path({str(tmp_path / "call")!r}).write_text(json.dumps([sys.argv[1:], sys.stdin.read()]))
print({out!r}); print({err!r}, file=sys.stderr); sys.exit({code})
"""
        program.write_text(text)
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
        return tmp_path / "call"

    return make


def test_dry_run_prints_what_the_real_run_submits(fake, capsys, tmp_path):
    call = fake()
    words = ["--nodes=4", "--gpus_per_node=8", "--tasks_per_node=2", "--time=1-0", "--retries=3", "--account=me"]
    words += ["--setup=module load cuda", "--sbatch=--exclusive", f"--logs={tmp_path / 'logs'}", *TRAINING]
    assert run("--dry_run", *words) == 0
    assert not call.exists() and not (tmp_path / "logs").exists()
    shown = capsys.readouterr().out
    assert run(*words) == 0
    argv, script = json.loads(call.read_text())
    assert shown.startswith(f"sbatch {' '.join(argv)} <<'END'\n{script.rstrip()}\nEND\n")
    assert (tmp_path / "logs").is_dir() and "squeue --job 17" in capsys.readouterr().err
    options = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    assert {"--nodes=4", "--ntasks-per-node=2", "--gpus-per-node=8", "--time=1-0", "--signal=TERM@120"} <= set(options)
    assert {"--requeue", "--account=me", "--exclusive", "--open-mode=append"} <= set(options)
    training = f"{sys.executable} -m launch.train --config=configs/quickstart.py --workdir=runs/mine"
    assert f"module load cuda\nsrun --ntasks-per-node=2 {training}\n" in script


@pytest.mark.parametrize(
    ("code", "restarts", "queues"),
    [(0, 0, False), (2, 0, False), (3, 0, False), (75, 0, True), (134, 1, True), (75, 2, False)],
)
def test_script_queues_again_as_often_as_told(code, restarts, queues, tmp_path):
    cli.parse(slurm.FLAGS, ["--retries=2"])
    script = slurm.script(slurm.FLAGS, jobs.training(TRAINING[1:]), tmp_path)
    for name, text in {"srun": f"exit {code}", "scontrol": 'echo "queued $*"', "sleep": ":"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    env |= {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
    done = subprocess.run(["bash"], input=script, text=True, capture_output=True, env=env, timeout=20)
    assert done.returncode == code and done.stderr == ""
    assert ("queued requeue 17" in done.stdout) == queues


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-2", 93600), ("1-2:3", 93780), ("1-2:3:4", 93784)],
)
def test_time_limits_are_read_as_slurm_does(text, seconds):
    assert slurm.seconds(text) == seconds


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--time=soon"], "--time is 'soon'"),
        (["--time=1"], "--time is 1 (60 s) and --grace 120 s"),
        (["--gpus_per_node=3", "--tasks_per_node=2"], "--gpus_per_node is 3 and --tasks_per_node 2"),
        (["--name=a b"], "--name is 'a b'"),
        (["--nodes=0"], "--nodes is '0'"),
        (["--mem=lots"], "--mem is 'lots'"),
        (["--grace=70000"], "--grace is '70000'"),
    ],
)
def test_bad_flags_are_told_before_anything_is_submitted(words, told, fake, capsys):
    call = fake()
    assert run(*words, *TRAINING) == 2
    assert told in capsys.readouterr().err and not call.exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "there is no training"),
        (["--", "--config=configs/quickstart.py"], "--workdir is missing"),
        (["--", "--config=configs/quickstar.py", "--workdir=w"], "did you mean configs/quickstart.py"),
        ([*TRAINING, "--config.train.step=5"], "train.step"),
        (
            ["--nodes=2", *TRAINING, "--workdir=s3://b/r"],
            "--workdir is on s3:// (s3://b/r) and the run has 2 processes",
        ),
    ],
)
def test_bad_training_is_told_before_anything_is_submitted(words, told, fake, capsys):
    call = fake()
    assert run(*words) == 2
    assert told in capsys.readouterr().err and not call.exists()


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("sbatch: error: invalid partition specified: no", "--partition is 'no'; sinfo"),
        ("sbatch: error: Batch job submission failed: Invalid account or account/partition", "sacctmgr"),
        ("sbatch: error: Unable to contact slurm controller (connect failure)", "controller does not answer"),
        ("sbatch: error: something new", "sbatch --parsable ended with 1: sbatch: error: something new."),
    ],
)
def test_failures_of_sbatch_are_one_sentence(said, told, fake, capsys, tmp_path):
    fake(err=said, code=1)
    assert run("--partition=no", f"--logs={tmp_path}", *TRAINING) in (1, 2)
    err = capsys.readouterr().err
    assert told in err and len(err.splitlines()) == 1


def test_missing_sbatch_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(f"--logs={tmp_path}", *TRAINING) == 2
    assert "sbatch is not installed here; install SLURM's client" in capsys.readouterr().err


# A real SLURM.

CONFIG = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
KillWait=5
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=500 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:2
"""
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def wait_for(what, seconds: float, why=lambda: ""):
    """Return the first true answer of `what()`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if answer := what():
            return answer
        time.sleep(0.1)
    pytest.fail(f"nothing in {seconds} s\n{why()}")


@pytest.fixture
def real_slurm(tmp_path, monkeypatch):
    """Start munge and SLURM as one machine of two CPUs, in a temporary folder, and stop them."""
    monkeypatch.setenv("PATH", os.environ["PATH"] + ":/usr/sbin:/sbin")
    if missing := [program for program in DAEMONS if not shutil.which(program)]:
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge")
    tmp_path.chmod(0o755)
    for name in ("state", "spool"):
        (tmp_path / name).mkdir()
    key = tmp_path / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    controller, node = free_ports(2)
    host = socket.gethostname().split(".")[0]
    text = CONFIG.format(host=host, user=getpass.getuser(), controller=controller, node=node, folder=tmp_path)
    (tmp_path / "slurm.conf").write_text(text)
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
    munge = [f"--{name}={tmp_path / file}" for name, file in files.items()]
    commands = [
        ["munged", "--foreground", "--force", *munge, f"--log-file={tmp_path}/munge.log"],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", host],
    ]
    daemons = []
    logs = lambda: "\n".join(f"{p.name}: {p.read_text()[-1500:]}" for p in tmp_path.glob("*.log"))  # noqa: E731
    try:
        for command in commands:
            with (tmp_path / f"{command[0]}-output.log").open("wb") as output:
                daemons.append(subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True))
            if command[0] == "munged":
                wait_for((tmp_path / "munge.socket").exists, 10, logs)
        idle = lambda: "idle" in output_of("sinfo", "--noheader", "--format=%T")  # noqa: E731
        wait_for(idle, 30, logs)
        yield tmp_path
    finally:
        with contextlib.suppress(subprocess.SubprocessError):
            output_of("scancel", "--user", getpass.getuser())
            wait_for(lambda: not output_of("squeue", "--noheader"), 20, logs)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def output_of(*command: str) -> str:
    done = subprocess.run(command, text=True, capture_output=True, timeout=20)
    return done.stdout.strip()


CONFIG_FILE = """
from pathlib import Path
from aether.config import default_config

def get_config():
    c = default_config()
    here = Path(__file__).parent
    c.model.layers, c.model.heads, c.model.width = 1, 2, 16
    c.data.path, c.data.context, c.data.batch_size = str(here / "text"), 16, 4
    c.train.steps = int((here / "steps").read_text())
    c.train.eval_batches = 1
    c.train.log_every = 1
    c.checkpoint.every = 1000000
    c.faults.heartbeat_timeout_seconds = 100
    return c
"""


@pytest.mark.slow
def test_two_tasks_are_stopped_queued_again_and_come_to_the_end(real_slurm, capsys):
    tmp = real_slurm
    (tmp / "text").mkdir()
    (tmp / "text" / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    (tmp / "config.py").write_text(CONFIG_FILE)
    (tmp / "steps").write_text("1000000")
    words = ["--tasks_per_node=2", "--time=10", f"--logs={tmp}/logs", "--name=two", "--retries=2"]
    assert run(*words, "--", f"--config={tmp}/config.py", f"--workdir={tmp}/run") == 0
    job = capsys.readouterr().err.split("squeue --job ")[1].split()[0]
    log, metrics = tmp / "logs" / f"two-{job}.log", tmp / "run" / "metrics.jsonl"
    told = lambda: log.read_text() if log.exists() else f"no log; {output_of('scontrol', 'show', 'job', job)}"  # noqa: E731
    assert "Requeue=1" in output_of("scontrol", "show", "job", job)

    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 3, 240, told)
    output_of("scancel", "--signal=TERM", job)  # to the tasks alone, as the signal before the time limit
    wait_for(lambda: "queueing again" in told(), 120, told)
    assert "exit code 75" in told()
    last = last_step(metrics)
    (tmp / "steps").write_text(str(last + 3))
    show = lambda: output_of("scontrol", "show", "job", job)  # noqa: E731
    wait_for(lambda: "JobState=COMPLETED" in show(), 240, lambda: f"{show()}\n{told()}")
    assert "Restarts=1" in show() and "ExitCode=0:0" in show()
    assert last_step(metrics) == last + 3


def last_step(metrics: Path) -> int:
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return max(line["step"] for line in lines)
