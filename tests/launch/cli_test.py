"""Flags, `--help`, exit codes and the environment, in this process and in real ones."""

import errno
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from absl import flags

from aether.config import knobs
from aether.errors import AetherError, CheckError, InputError, Stopped, StorageError
from aether.plan.machine import NO_TPU
from launch import cli

ROOT = Path(__file__).parents[2]
MAINS = ("train", "evaluate", "generate")


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """Keep what the mains set to this test."""
    names = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "TF_CPP_MIN_LOG_LEVEL", *NO_TPU)
    for name in names:
        monkeypatch.setenv(name, "x")  # so that monkeypatch remembers it
        monkeypatch.delenv(name)
    monkeypatch.setenv("AETHER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cli.tempfile, "tempdir", str(tmp_path))
    level = logging.getLogger("absl").level
    yield
    logging.getLogger("absl").setLevel(level)


def new_flags() -> flags.FlagValues:
    values = cli.new_flags(config=True)
    flags.DEFINE_integer("num", 1, "how many", flag_values=values, lower_bound=1)
    flags.DEFINE_string("workdir", "", "where", flag_values=values)
    return values


def outcome(capsys, error: BaseException, *argv: str) -> tuple[int, str]:
    def main(args):
        raise error

    code = cli.run(main, new_flags(), "doc", list(argv))
    out, err = capsys.readouterr()
    assert out == ""
    return code, err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("bad key"), 2),
        (CheckError("too many"), 3),
        (StorageError("full"), 74),
        (AetherError("other"), 1),
    ],
)
def test_our_errors_are_one_line_with_their_code(capsys, error, code):
    assert outcome(capsys, error) == (code, f"error: {error}\n")


def test_stopped_is_no_error(capsys):
    assert outcome(capsys, Stopped("stopped at step 7, all saved")) == (75, "stopped at step 7, all saved\n")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_bad_disk_is_74(capsys, number):
    code, err = outcome(capsys, OSError(number, os.strerror(number), "runs/x"))
    assert code == 74 and os.strerror(number) in err and "runs/x" in err and err.count("\n") == 1


def test_the_cause_decides_too(capsys):
    wrapped = RuntimeError("while saving")
    wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert outcome(capsys, wrapped)[0] == 74


def test_another_os_error_is_unexpected(capsys):
    assert outcome(capsys, OSError(errno.ENOENT, "No such file"))[0] == 1


def test_an_interrupt_is_1_without_traceback(capsys):
    code, err = outcome(capsys, KeyboardInterrupt())
    assert code == 1 and err.startswith("interrupted") and err.count("\n") == 1


def test_the_unexpected_is_one_line_and_keeps_its_traceback(capsys, tmp_path):
    code, err = outcome(capsys, ValueError("first\nsecond"))
    (kept,) = tmp_path.glob("aether-error-*.txt")
    assert code == 1 and err.startswith("unexpected error: ValueError: first;") and err.count("\n") == 1
    assert str(kept) in err and "--debug" in err
    assert "Traceback" in kept.read_text() and "second" in kept.read_text()


def test_no_room_for_the_traceback(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli.tempfile, "tempdir", str(tmp_path / "missing"))
    code, err = outcome(capsys, ValueError("first"))
    assert code == 1 and "ValueError: first" in err and "--debug" in err


@pytest.mark.parametrize("error", [InputError("bad"), ValueError("bad"), KeyboardInterrupt()])
def test_debug_shows_the_traceback(capsys, error):
    assert "Traceback" in outcome(capsys, error, "--debug")[1]


def test_values_reach_the_main():
    seen = []
    argv = ["--num", "3", "--workdir=a b", "--config", "x.py", "--config.train.steps=4", "--config.mesh.data", "-1"]
    assert cli.run(seen.append, new_flags(), "doc", argv) == 0
    (args,) = seen
    assert (args.num, args.workdir, args.config) == (3, "a b", "x.py")
    assert args.override == ["train.steps=4", "mesh.data=-1"]


def test_a_switch_needs_no_value():
    seen = []
    assert cli.run(seen.append, new_flags(), "doc", ["--config.model.spherical", "--num=2"]) == 0
    assert seen[0].override == ["model.spherical=true"] and seen[0].num == 2


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--nun=3"], ["--nun", "did you mean --num?"]),
        (["--qqq=3"], ["--qqq", "--num", "--workdir", "--help"]),
        (["--train.steps=3"], ["--train.steps", "--config.train.steps"]),
        (["--num=q"], ["--num", "'q'", "positive integer"]),
        (["--num=0"], ["--num", "'0'", "positive integer"]),
        (["--debug=perhaps"], ["--debug", "'perhaps'", "true or false"]),
        (["--workdir"], ["--workdir"]),
        (["stray"], ["'stray'", "--flag=value"]),
        (["--config.train.steps"], ["--config.train.steps=VALUE"]),
        (["--config.train.steps", "--num=3"], ["--config.train.steps=VALUE"]),
    ],
)
def test_wrong_flags_are_one_sentence(capsys, argv, parts):
    assert cli.run(lambda args: None, new_flags(), "doc", argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and cli.OVERRIDE not in err
    assert all(part in err for part in parts), err


def test_config_of_names_a_missing_flag():
    values = new_flags()
    cli.parse(values, [])
    with pytest.raises(InputError, match="--config is missing"):
        cli.config_of(values)


@pytest.mark.parametrize("word", ["--help", "-h", "--helpfull"])
def test_help_lists_everything_and_wins_over_mistakes(capsys, word):
    assert cli.run(lambda args: pytest.fail("ran"), new_flags(), "What it does.", ["--nonsense", word]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.startswith("What it does.") and cli.OVERRIDE not in out
    assert "--num [1]" in out and "how many" in out
    unwrapped = " ".join(out.split())
    for key, knob in knobs():
        assert key in unwrapped and knob.metadata["doc"] in unwrapped
        assert all(choice in unwrapped for choice in knob.metadata["choices"])
    assert max(map(len, out.splitlines())) < 140


def test_the_environment_is_set_but_never_overwritten(monkeypatch, tmp_path):
    cli.prepare_environment(debug=False)
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "cache" / "xla")
    assert logging.getLogger("absl").level == logging.ERROR
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    cli.prepare_environment(debug=True)
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "mine"
    assert logging.getLogger("absl").level == logging.INFO


def launch(main: str, *argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", f"launch.{main}", *argv], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("main", MAINS)
def test_help_of_the_real_mains(main):
    start = time.perf_counter()
    done = launch(main, "--help")
    assert (done.returncode, done.stderr) == (0, "") and f"python -m launch.{main}" in done.stdout
    assert time.perf_counter() - start < 2


def test_mistakes_in_the_real_mains():
    done = launch("train", "--config=configs/quickstart.py", "--config.train.stepz=1")
    assert (done.returncode, done.stdout) == (2, "") and "did you mean train.steps" in done.stderr
    assert done.stderr.count("\n") == 1
    done = launch("generate", "--workdir=x", "--top_p=2")
    assert done.returncode == 2 and "--top_p is 2.0" in done.stderr


def test_the_mains_load_nothing_slow():
    code = "import launch.train, launch.evaluate, launch.generate, sys; print({'jax', 'grain'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_wrong_choice_lists_the_right_ones(capsys):
    values = cli.new_flags()
    flags.DEFINE_enum("what", "layers", ["layers", "distance"], "which table", flag_values=values)
    assert cli.run(lambda args: pytest.fail("ran"), values, "doc", ["--what=foo"]) == 2
    assert capsys.readouterr().err == "error: --what is 'foo'; it takes one of layers, distance.\n"


def test_libtpu_is_quiet_where_there_is_no_tpu(monkeypatch, tmp_path):
    """Training asks JAX for its devices; libtpu, there for `launch.plan`, would look for machines that are not."""
    from aether.processes import cluster

    for name in (names := ("TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES")):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "accel0").touch()
    monkeypatch.setattr(cluster, "TPU_FILES", (f"{tmp_path}/accel*",))
    cli.prepare_environment(False)
    assert not any(name in os.environ for name in names)
    monkeypatch.setattr(cluster, "TPU_FILES", ())
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "mine")
    cli.prepare_environment(False)
    assert os.environ["TPU_SKIP_MDS_QUERY"] == "1" and os.environ["TPU_WORKER_HOSTNAMES"] == "mine"
