"""The Cloud TPU launcher against a gcloud that plays a queue and machines, and its scripts in a real shell."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from launch import cli, jobs, tpu_vm, workers

TRAINING = ["--", "--config=configs/quickstart.py", "--workdir=gs://bucket/mine"]
FLAGS = ["--name=mine", "--zone=here", "--topology=v5p:2x2x2", "--runtime=soft", "--poll=0"]

# Answers from `plays`: (regular expression on the argv, [[code, out, err], ...]), the last one again and again.
GCLOUD = """#!{python}
import json, pathlib, re, sys
here = pathlib.Path({here!r})
argv = sys.argv[1:]
with (here / "calls").open("a") as file:
    file.write(json.dumps(["gcloud", *argv]) + "\\n")
plays = json.loads((here / "plays").read_text())
for pattern, answers in plays:
    if re.search(pattern, " ".join(argv)):
        code, out, err = answers[0]
        if len(answers) > 1:
            del answers[0]
            (here / "plays").write_text(json.dumps(plays))
        print(out) if out else None
        print(err, file=sys.stderr) if err else None
        sys.exit(code)
"""
MISSING = [1, "", "ERROR: NOT_FOUND: Resource was not found"]


def state(name: str) -> list:
    return [0, name, ""]


def ended(code: int | str, *lines: str) -> list:
    return [0, "\n".join([*lines, f"{workers.MARK} {code}"]), ""]


NEW, DONE, SILENT = (MISSING, state("ACTIVE")), (ended(0),), (state(""),)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(cli, "prepare_environment", lambda debug: None)


@pytest.fixture
def gcloud(tmp_path, monkeypatch):
    """Put a gcloud on PATH that plays `plays`, and return what reads the calls it got."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "gcloud"
    program.write_text(GCLOUD.format(python=sys.executable, here=str(tmp_path)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)

    def play(states=NEW, follows=DONE, running="no", create=SILENT):
        plays = [
            ["queued-resources describe", list(states)],
            ["queued-resources create", list(create)],
            ["kill -0 -- .*echo yes", [[0, running, ""]]],
            ["tail -n", list(follows)],
        ]
        (tmp_path / "plays").write_text(json.dumps(plays))

    def calls() -> list[list[str]]:
        file = tmp_path / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    play.calls = calls
    return play


def run(*argv: str) -> int:
    return jobs.run(tpu_vm.main, tpu_vm.FLAGS, tpu_vm.__doc__, list(argv))


def verbs(calls: list[list[str]]) -> list[str]:
    """Name what each call is about."""
    names = {"tail -n": "follow", "echo yes": "look", "setsid": "start", "tar -xzf": "install", "kill -TERM": "stop"}
    return [next((v for k, v in names.items() if k in " ".join(c)), c[4]) for c in calls]


@pytest.mark.parametrize("more", [["--spot"], ["--slices=2", "--delete", "--project=p"]])
def test_dry_run_prints_the_commands_of_the_real_run(more, gcloud, capsys):
    gcloud()
    words = [*FLAGS, *more, *TRAINING]
    assert run("--dry_run", *words) == 0
    assert gcloud.calls() == []
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("gcloud")]
    assert run(*words) == 0
    archive = re.compile(r"\S*/aether-mine\.tgz(?= )")  # in a new folder each time
    real = [shlex.join(call) for call in gcloud.calls()]
    assert [archive.sub("A", line) for line in shown] == [archive.sub("A", line) for line in real]


def test_a_new_run_goes_through_all_steps(gcloud, capsys):
    gcloud(
        [MISSING, state("WAITING_FOR_RESOURCES"), state("PROVISIONING"), state("ACTIVE")],
        [ended(0, "step 1", "step 2")],
    )
    assert run(*FLAGS, "--slices=2", *TRAINING) == 0
    captured = capsys.readouterr()
    assert captured.out == "step 1\nstep 2\n"
    assert "mine: WAITING_FOR_RESOURCES, 0:00:0" in captured.err and "mine: PROVISIONING" in captured.err
    begin = ["describe", "create", "describe", "describe", "describe", "look"]
    assert verbs(gcloud.calls()) == [*begin, *["scp", "install"] * 2, "stop", "stop", "start", "start", "follow"]
    create = gcloud.calls()[1]
    assert {"--type=v5p", "--topology=2x2x2", "--node-count=2", "--node-prefix=mine", "--zone=here"} <= set(create)


def test_a_run_that_goes_on_is_only_followed(gcloud):
    gcloud([state("ACTIVE")], [ended(0)], running="yes")
    assert run(*FLAGS, *TRAINING) == 0
    assert verbs(gcloud.calls()) == ["describe", "look", "follow"]


def test_preemption_creates_the_machines_anew_and_exit_75_starts_again(gcloud, capsys):
    states = [
        state("ACTIVE"),
        state("ACTIVE"),
        state("SUSPENDED"),
        state("SUSPENDED"),
        state("SUSPENDED"),
        state("ACTIVE"),
    ]
    gcloud(states, [ended(75), [255, "step 5", "lost"], ended(0)])
    assert run(*FLAGS, *TRAINING) == 0
    told = capsys.readouterr().err
    assert "exit code 75; try 1 of" in told and "its machines; try 2 of" in told
    again = verbs(gcloud.calls())
    assert again.count("follow") == 3 and again.count("install") == 2 and again.count("create") == 1
    assert again.index("delete") < again.index("create") < len(again) - again[::-1].index("install")


def test_a_lost_connection_goes_on_at_the_next_line(gcloud, capsys):
    gcloud([state("ACTIVE")], [[255, "one\ntwo", "closed"], ended(0, "three")], running="yes")
    assert run(*FLAGS, *TRAINING) == 0
    assert capsys.readouterr().out == "one\ntwo\nthree\n"
    follows = [" ".join(c) for c in gcloud.calls() if "tail" in " ".join(c)]
    assert "tail -n +1 " in follows[0] and "tail -n +3 " in follows[1]


@pytest.mark.parametrize(("code", "starts"), [(2, 1), (3, 1), (75, 3), (134, 3), ("lost", 3)])
def test_what_is_tried_again(code, starts, gcloud, capsys):
    gcloud([state("ACTIVE")], [ended(code)])
    assert run(*FLAGS, "--retries=2", *TRAINING) == (137 if code == "lost" else code)
    assert verbs(gcloud.calls()).count("start") == starts
    assert "exit code" in capsys.readouterr().err


def test_delete_alone_and_detach(gcloud):
    gcloud([state("ACTIVE")])
    assert run("--name=mine", "--zone=here", "--delete") == 0
    assert verbs(gcloud.calls()) == ["delete"]
    assert run(*FLAGS, "--detach", *TRAINING) == 0
    assert verbs(gcloud.calls())[-1] == "start"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "ERROR: RESOURCE_EXHAUSTED: Quota limit 'TPUV5' has been exceeded.",
            "There is no quota for v5p:2x2x2 in here",
        ),
        ("ERROR: Permission denied on 'locations/here' (or it may not exist).", "--zone is here"),
        ("ERROR: (gcloud) PERMISSION_DENIED: no", "TPU Admin"),
        ("ERROR: Please run: gcloud auth login", "gcloud knows no account"),
        ("ERROR: something new.", "ended with 1: ERROR: something new."),
    ],
)
def test_failures_of_gcloud_are_one_sentence(said, told, gcloud, capsys):
    gcloud([MISSING], create=[[1, "", said]])
    assert run(*FLAGS, *TRAINING) in (1, 2)
    err = capsys.readouterr().err
    assert told in err and len(err.splitlines()) == 1


def test_a_request_that_fails_in_the_queue_is_told(gcloud, capsys):
    gcloud([MISSING, state("FAILED")])
    assert run(*FLAGS, *TRAINING) == 1
    assert "The queued resource mine has FAILED" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--name=Mine", *FLAGS[1:], *TRAINING], "--name is 'Mine'"),
        ([*FLAGS, "--accelerator=v5p-16", *TRAINING], "give one of them"),
        ([*FLAGS[:2], "--accelerator=v9-8", "--runtime=r", *TRAINING], "--accelerator is 'v9-8'"),
        ([*FLAGS[:2], "--topology=tpu7x:2x2x2", "--runtime=r", *TRAINING], "use launch.gke"),
        ([*FLAGS, "--spot", "--reserved", *TRAINING], "--spot and --reserved"),
        ([*FLAGS, *TRAINING[:2], "--workdir=runs/x"], "--workdir is runs/x and there are 2 machines"),
        ([*FLAGS, "--", "--config=/etc/hostname", "--workdir=gs://b/x"], "/etc/hostname"),
        ([*FLAGS[:1], *TRAINING], "--zone is missing"),
    ],
)
def test_bad_input_is_told_before_anything_is_asked_for(words, told, gcloud, capsys):
    gcloud()
    assert run(*words) == 2
    assert told in capsys.readouterr().err and gcloud.calls() == []


@pytest.mark.parametrize(
    ("accelerator", "hosts"),
    [
        ("v5p-8", 1),
        ("v5p-128", 16),
        ("v5litepod-8", 1),
        ("v5litepod-16", 4),
        ("v6e-8", 1),
        ("v6e-256", 64),
        ("v4-32", 4),
    ],
)
def test_machines_of_a_slice(accelerator, hosts):
    assert workers.hosts(accelerator, "") == hosts


def test_without_gcloud_it_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(*FLAGS, *TRAINING) == 2
    assert "gcloud is not installed here; install the Google Cloud CLI" in capsys.readouterr().err


def shell(home: Path, script: str) -> str:
    """Run a script as ssh does, in the home folder."""
    done = subprocess.run(["bash", "-c", script], cwd=home, text=True, capture_output=True, timeout=20)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_scripts_start_follow_and_stop_a_process_that_outlives_the_connection(tmp_path):
    (tmp_path / "aether-x" / "code").mkdir(parents=True)
    assert shell(tmp_path, workers.is_running("x")) == "no\n"
    shell(tmp_path, workers.start("x", "sh -c 'echo one; echo two; exit 3'"))
    assert shell(tmp_path, workers.follow("x", 1)) == f"one\ntwo\n{workers.MARK} 3\n"
    assert shell(tmp_path, workers.follow("x", 2)) == f"two\n{workers.MARK} 3\n"
    assert shell(tmp_path, workers.is_running("x")) == "no\n"

    saves = (
        "import signal, sys, time; signal.signal(15, lambda *a: sys.exit(75)); print('on', flush=True); time.sleep(60)"
    )
    shell(tmp_path, workers.start("x", shlex.join([sys.executable, "-c", saves])))
    group = int((tmp_path / "aether-x" / "pid").read_text())
    try:
        end = time.monotonic() + 10
        while "on" not in (tmp_path / "aether-x" / "log").read_text() and time.monotonic() < end:
            time.sleep(0.05)
        assert shell(tmp_path, workers.is_running("x")) == "yes\n"
        shell(tmp_path, workers.stop("x"))
        assert shell(tmp_path, workers.follow("x", 1)) == f"on\n{workers.MARK} 75\n"
        assert (tmp_path / "aether-x" / "log.before").read_text() == "one\ntwo\n"
    finally:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            pass


def test_archive_has_what_git_does_not_ignore(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    for name in ("new.py", "skipped.log", "with space"):
        (tmp_path / name).write_text(name)
    (tmp_path / ".gitignore").write_text("*.log\n")
    monkeypatch.setattr(jobs, "ROOT", tmp_path)
    with workers.archive(jobs.Shell(False), "x") as file, tarfile.open(file) as tar:
        assert sorted(tar.getnames()) == [".gitignore", "new.py", "with space"]


def test_a_question_that_fails_for_now_is_asked_again(gcloud, capsys, monkeypatch):
    monkeypatch.setattr(jobs, "WAITS", (0.0, 0.0))
    busy = [1, "", "ERROR: (gcloud) UNAVAILABLE: The service is currently unavailable."]
    gcloud([busy, state("ACTIVE"), busy, busy, state("ACTIVE")], [[255, "step 5", "lost"], ended(0)])
    assert run(*FLAGS, *TRAINING) == 0
    assert "The service is currently unavailable: asking again in 0 s" in capsys.readouterr().err
    gcloud([busy])
    assert run(*FLAGS, *TRAINING) == 1
    assert "UNAVAILABLE" in capsys.readouterr().err.splitlines()[-1]
    gcloud([[1, "", "ERROR: PERMISSION_DENIED: no"]])
    before = len(gcloud.calls())
    assert run(*FLAGS, *TRAINING) == 2
    assert len(gcloud.calls()) == before + 1 and "TPU Admin" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("ERROR: (gcloud) You do not currently have an active account selected.", "run gcloud auth login"),
        ("ERROR: (gcloud) Failed to find attribute [project]. The attribute can be set ...", "give --project=ID"),
    ],
)
def test_an_unready_gcloud_is_told(said, told, gcloud, capsys):
    gcloud([[1, "", said]])
    assert run(*FLAGS, *TRAINING) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["v5p-7", "v4-12", "v5litepod-3", "v6e-512", "v5litepod-0"])
def test_slices_that_there_are_not(kind, gcloud, capsys):
    gcloud()
    words = [word for word in FLAGS if "topology" not in word]
    assert run(*words, f"--accelerator={kind}", *TRAINING) == 2
    assert f"--accelerator is '{kind}'" in capsys.readouterr().err and gcloud.calls() == []
    assert run("--dry_run", *words, "--accelerator=v5p-24", *TRAINING) == 0


def test_nobody_deletes_what_nobody_follows(gcloud, capsys):
    gcloud()
    assert run(*FLAGS, "--detach", "--delete", *TRAINING) == 2
    assert "--delete and --detach are both given" in capsys.readouterr().err and gcloud.calls() == []
