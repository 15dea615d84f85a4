import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from aether.config import build
from aether.train.flops import flops_per_step

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # tools/ is not installed
study, plans, runs, tables = (
    importlib.import_module(f"tools.{name}") for name in ("study", "study_plan", "study_runs", "study_tables")
)
CONFIG = ROOT / "configs/shakespeare_char.py"

# Stands in for launch.train: its loss rises with the distance of the learning rate's logarithm from the kind's best,
# its accuracy with the logarithm.
FAKE = """
import json, math, os, pathlib, re, signal, sys, time
flags = dict(word.removeprefix("--").removeprefix("config.").split("=", 1) for word in sys.argv[1:])
out, steps, seed = pathlib.Path(flags["workdir"]), int(flags["train.steps"]), int(flags["train.seed"])
rate, kind = float(flags.get("optim.learning_rate", 1e-3)), flags.get("model.kind", "aether")
mood = os.environ.get("MOOD", "")
out.mkdir(parents=True, exist_ok=True)
with open(out / "starts", "a") as file:
    file.write(f"{sorted(os.sched_getaffinity(0))}\\n")
if mood == "slow":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (out / "ready").touch()
    time.sleep(60)
if mood == "missing":
    print("error: data.path is gone.", file=sys.stderr)
    sys.exit(2)
if mood == "crash" and rate == 1e-3:
    raise MemoryError("no room")
(out / "config.json").write_text(pathlib.Path(__file__).with_name("made.json").read_text())
if mood == "nan" and rate == 1e-2:
    sys.exit(3)
best, more = (1e-3, 0.25 + seed**2 / 1000) if kind == "gpt2" else (3e-3, 0)
loss = 1.5 + abs(math.log10(rate / best)) + seed / 100 + more
if mood == "nan" and rate == 1e-3:
    loss = None
unit = "images" if "digits" in flags["config"] else "tokens"
held = dict(step=steps, split="held", loss=loss, accuracy=0.9 + math.log10(rate / 1e-2) / 10 - seed / 100)
lines = [dict(step=steps, split="train", loss=2.0, accuracy=0.0) | {f"{unit}_per_second": 500.0}, held]
lines += [dict(step=steps, split="other", loss=9.0, accuracy=0.0), held | dict(step=steps - 1, loss=0.0, accuracy=0.0)]
(out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
(out / "checkpoints" / str(steps)).mkdir(parents=True, exist_ok=True)
arrays = {"params/a": dict(shape=[3, 4]), "params/b": dict(shape=[]), "opt_state/a": dict(shape=[100])}
(out / "checkpoints" / str(steps) / "meta.json").write_text(json.dumps(dict(arrays=arrays)))
"""

TINY = build(dict(model=dict(layers=1, width=8, heads=1), data=dict(context=4, batch_size=2))).resolved(vocab=16)


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run a study with the stand-in; return exit code, stdout, stderr."""
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "made.json").write_text(json.dumps(dict(git="abc", config=TINY.to_json())))
    monkeypatch.setattr(runs, "TRAIN", [sys.executable, "-S", str(tmp_path / "fake.py")])
    monkeypatch.setattr(study.cli, "prepare_environment", lambda debug: None)

    def call(*more: str, mood: str = "") -> tuple[int, str, str]:
        monkeypatch.setenv("MOOD", mood)
        argv = [f"--config={CONFIG}", "--config.train.steps=8", f"--out={tmp_path}/out", *more]
        code = study.cli.run(study.main, study.define(), study.__doc__, argv)
        return code, *capsys.readouterr()

    return call


SWEEP = ("--vary=model.kind=gpt2,aether", "--sweep=optim.learning_rate=1e-2,1e-3,3e-3", "--seeds=3", "--jobs=2")


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_each_combination_is_compared_at_its_own_best_value(call, tmp_path):
    code, out, err = call(*SWEEP)
    assert code == 0, err
    main, sweep, note, revision = out.strip().split("\n\n")
    head, _, gpt2, aether = map(cells, main.splitlines())
    assert head[1:] == [
        "optim.learning_rate",
        "loss",
        "seed 0",
        "seed 1",
        "seed 2",
        "difference",
        "parameters",
        "tokens/s",
    ]
    a, b = np.array([1.75, 1.761, 1.774]), np.array([1.5, 1.51, 1.52])
    pairs = (b - a).mean(), (b - a).std(ddof=1) / np.sqrt(3)
    assert gpt2[:3] == ["kind=gpt2", "0.001 (edge)", f"{a.mean():.4f} ± {a.std(ddof=1) / np.sqrt(3):.4f}"]
    assert aether[:3] == ["kind=aether", "0.003", f"{b.mean():.4f} ± {b.std(ddof=1) / np.sqrt(3):.4f}"]
    assert gpt2[3:] == ["1.7500", "1.7610", "1.7740", "", "13", "500"]
    assert aether[3:] == ["1.5000", "1.5100", "1.5200", f"{pairs[0]:+.4f} ± {pairs[1]:.4f}", "13", "500"]
    assert [cells(row)[1:] for row in sweep.splitlines()[2:]] == [
        ["**1.7500**", "2.2271", "2.7500"],
        ["1.9771", "**1.5000**", "2.0229"],
    ]
    assert "kind=gpt2: optim.learning_rate=0.001 is the smallest" in note and "abc" in revision
    assert (tmp_path / "out/sweep.png").stat().st_size > 10_000
    found = lines(tmp_path / "out")
    assert sorted(r["steps"] for r in found) == [4] * 6 + [8] * 6 and "[12/12]" in err
    assert all(r["losses"]["other"] == 9.0 and "train.seed" in r["command"] and r["status"] == "done" for r in found)


def test_whole_runs_are_drawn_over_what_they_cost(call, tmp_path):
    assert call(*SWEEP)[0] == 0
    assert {r["flops"] / r["steps"] for r in lines(tmp_path / "out")} == {flops_per_step(TINY)}
    assert (tmp_path / "out/compute.png").stat().st_size > 10_000


def made(out: Path) -> list[tuple]:
    """Return (combination, value, steps, seed) of each run."""
    return sorted((r["combination"], r["value"], r["steps"], r["seed"]) for r in lines(out))


RATES = "--sweep=optim.learning_rate=1e-4,3e-4,1e-3,3e-3,1e-2"


def test_halving_keeps_the_better_half_of_each(call, tmp_path):
    """Of gpt2 1e-3 is the best, then 3e-3 and 3e-4; of aether 3e-3, then 1e-3 and 1e-2."""
    words = ("--vary=model.kind=gpt2,aether", RATES, "--rungs=3", "--seeds=2", "--config.train.steps=16")
    code, out, err = call(*words)
    assert code == 0, err
    found = made(tmp_path / "out")
    kept = {
        "kind=gpt2": ([3e-4, 1e-3, 3e-3], [1e-3, 3e-3], 1e-3),
        "kind=aether": ([1e-3, 3e-3, 1e-2], [1e-3, 3e-3], 3e-3),
    }
    wanted = []
    for kind, (second, third, best) in kept.items():
        wanted += [(kind, v, 2, 0) for v in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)] + [(kind, v, 4, 0) for v in second]
        wanted += [(kind, v, 8, 0) for v in third] + [(kind, best, 16, seed) for seed in (0, 1)]
    assert found == sorted(wanted) and f"[{len(wanted)}/{len(wanted)}]" in err
    sweep = [cells(row) for row in out.split("\n\n")[1].splitlines()[2:]]
    assert [cell.partition(" ")[2] for cell in sweep[0][1:]] == ["(2)", "(4)", "", "", "(2)"]
    assert [cell.startswith("**") for cell in sweep[1][1:]] == [False, False, False, True, False]
    assert call(*words)[:2] == (code, out) and made(tmp_path / "out") == found
    assert call("--table_only")[1] == out


CASES = """
[first]
[near]
"optim.learning_rate" = 1e-2
[best]
"optim.learning_rate" = 3e-3
[far]
"optim.learning_rate" = 1e-5
"model.kind" = "gpt2"
["a list, of 4"]
"optim.learning_rate" = 1e-4
"""


def test_finalists_are_the_first_case_and_the_best(call, tmp_path):
    """Scores, with a learning rate of 1e-3 where none is given: best, first, near, a list, far."""
    (tmp_path / "cases.toml").write_text(CASES)
    words = (f"--cases={tmp_path}/cases.toml", "--rungs=2", "--finalists=1", "--seeds=2", "--sweep_fraction=0.5")
    code, out, err = call(*words)
    assert code == 0, err
    found = made(tmp_path / "out")
    everyone = ["first", "near", "best", "far", "a list, of 4"]
    wanted = [(name, None, 2, 0) for name in everyone] + [(name, None, 4, 0) for name in ("first", "near", "best")]
    assert found == sorted([*wanted, *((n, None, 8, seed) for n in ("first", "best") for seed in (0, 1))], key=str)
    assert "Left behind: near, far, a list, of 4." in out and f"[{len(found)}/{len(found)}]" in err
    assert [cells(row)[0] for row in out.splitlines()[2:4]] == ["first", "near"] and "missing" not in out


def test_a_failed_run_holds_the_halving_up(call, tmp_path):
    words = ("--vary=model.kind=gpt2,aether", RATES, "--rungs=2", "--seeds=1")
    code, out, err = call(*words, mood="crash")
    assert code == 1 and "1e-3" not in out and {r["steps"] for r in lines(tmp_path / "out")} == {2}
    assert "runs are missing" in out
    assert call(*words)[0] == 0 and {r["steps"] for r in lines(tmp_path / "out")} == {2, 4, 8}


def test_the_same_command_runs_nothing_twice(call, tmp_path):
    _, first, _ = call(*SWEEP)
    with (tmp_path / "out/results.jsonl").open("a") as file:
        file.write('{"run": "torn')
    code, again, err = call(*SWEEP)
    assert (code, again) == (0, first) and "start" not in err and len(lines(tmp_path / "out")) == 12
    code, table, _ = call("--table_only", mood="missing")
    assert (code, table) == (0, first)
    wider = SWEEP[0], "--sweep=optim.learning_rate=3e-4,1e-3,3e-3,1e-2", "--seeds=4"
    assert call(*wider)[0] == 0
    assert len(lines(tmp_path / "out")) == 12 + 2 + 2
    starts = [(folder / "starts").read_text() for folder in (tmp_path / "out").glob("kind*")]
    assert len(starts) == 16 and all(text.count("\n") == 1 for text in starts)


def test_a_sweep_at_full_length_is_the_first_seed(call, tmp_path):
    code, out, err = call(*SWEEP, "--sweep_fraction=1")
    assert code == 0 and len(lines(tmp_path / "out")) == 10 and "[10/10]" in err and "missing" not in out


# Stands in for tools.study_together: of each copy the loss that FAKE has.
FAKE_TOGETHER = """
import json, math, pathlib, sys
flags = dict(word.removeprefix("--").removeprefix("config.").split("=", 1) for word in sys.argv[1:])
copies = json.loads(flags["copies"])
with open(pathlib.Path(__file__).with_name("programs"), "a") as file:
    file.write(f"{len(copies)}\\n")
if any(copy["seed"] == 2 for copy in copies):
    sys.exit("no room")
best, more = (1e-3, 0.25) if flags.get("model.kind", "aether") == "gpt2" else (3e-3, 0)
runs = {}
for copy in copies:
    loss = 1.5 + abs(math.log10(copy["value"] / best)) + copy["seed"] / 100 + more
    runs[copy["run"]] = dict(status="done", loss=loss, accuracy=0.5, losses=dict(held=loss), parameters=13)
made = json.loads(pathlib.Path(__file__).with_name("made.json").read_text())
pathlib.Path(flags["result"]).write_text(json.dumps(made | dict(runs=runs)))
"""


def test_runs_that_are_one_program_are_told_apart(call, tmp_path, monkeypatch):
    (tmp_path / "together.py").write_text(FAKE_TOGETHER)
    monkeypatch.setattr(runs, "TOGETHER", [sys.executable, "-S", str(tmp_path / "together.py")])
    words = (*SWEEP[:2], "--seeds=2")
    code, out, err = call(*words, "--together=2")
    assert code == 0 and "[10/10]" in err, err
    assert sorted((tmp_path / "programs").read_text().split()) == ["1", "1", "2", "2", "2", "2"]
    rows = [cells(row) for row in out.split("\n\n")[0].splitlines()[2:]]
    assert [row[1:5] for row in rows] == [
        ["0.001 (edge)", "1.7550 ± 0.0050", "1.7500", "1.7600"],
        ["0.003", "1.5050 ± 0.0050", "1.5000", "1.5100"],
    ]
    assert call(*words)[1] == out, "the same study one by one has nothing left to do"
    assert {r["flops"] / r["steps"] for r in lines(tmp_path / "out")} == {flops_per_step(TINY)}
    code, out, err = call(*SWEEP[:2], "--seeds=4", "--together=2")
    assert code == 1 and "4 runs failed" in err and "no room" in lines(tmp_path / "out")[-1]["error"]


def test_without_a_sweep_the_config_decides(call, tmp_path):
    code, out, _ = call("--vary=model.kind=gpt2,aether", "--vary=model.dropout=0,0.1", "--seeds=1")
    rows = [cells(row) for row in out.split("\n\n")[0].splitlines()[2:]]
    assert code == 0 and len(lines(tmp_path / "out")) == 4
    assert [row[0] for row in rows] == [f"kind={k},dropout={d}" for k in ("gpt2", "aether") for d in ("0", "0.1")]
    assert rows[2][1] == "1.9771" and rows[2][3] == "+0.2271"


IMAGES = (f"--config={ROOT}/configs/digits.py", "--vary=model.kind=resnet,aether_resnet", *SWEEP[1:], "--score=error")


def test_a_study_of_images_counts_images_and_may_go_by_the_error(call, tmp_path):
    code, out, err = call(*IMAGES)
    assert code == 0, err
    main, sweep = ([cells(row) for row in table.splitlines()] for table in out.split("\n\n")[:2])
    assert main[0][2] == "error %" and main[0][-1] == "images/s"
    assert [row[1:6] for row in main[2:]] == [["0.01 (edge)", "11.0000 ± 0.5774", "10.0000", "11.0000", "12.0000"]] * 2
    assert main[3][6:] == ["+0.0000 ± 0.0000", "13", "500"]
    assert [row[1:] for row in sweep[2:]] == [["20.0000", "15.2288", "**10.0000**"]] * 2, "the loss has another order"
    assert all(r["images_per_second"] == 500 and "tokens_per_second" not in r for r in lines(tmp_path / "out"))


def test_records_without_an_accuracy_have_no_error(call, tmp_path):
    assert call(*IMAGES)[0] == 0
    old = [{k: v for k, v in record.items() if k != "accuracy"} for record in lines(tmp_path / "out")]
    (tmp_path / "out/results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in old))
    code, out, err = call(*IMAGES)
    assert (code, out) == (2, "") and "no accuracy of kind=resnet" in err and err.count("\n") == 1
    assert call(*IMAGES[:-1])[0] == 0, "the loss is there"


def test_diverged_runs_lose_and_are_not_tried_again(call, tmp_path):
    code, out, _ = call(*SWEEP, mood="nan")
    sweep = [cells(row) for row in out.split("\n\n")[1].splitlines()[2:]]
    assert code == 0 and [row[1:] for row in sweep] == [
        ["diverged", f"**{x}**", "diverged"] for x in ("2.2271", "1.5000")
    ]
    assert {r["exit"] for r in lines(tmp_path / "out") if r["status"] == "diverged"} == {0, 3}
    assert "start" not in call(*SWEEP)[2]


def test_failures_are_lines_and_are_tried_again(call, tmp_path):
    code, out, err = call(*SWEEP, mood="crash")
    failed = [r for r in lines(tmp_path / "out") if r["status"] == "failed"]
    assert code == 1 and "2 runs failed" in err and "Failed, to be tried again" in out
    assert len(failed) == 2 and all(r["exit"] == 1 and "MemoryError: no room" in r["error"] for r in failed)
    code, out, err = call(*SWEEP)
    assert code == 0 and "0.001 (edge)" in out and "Failed" not in out and err.count("start") == 2 + 3


def test_input_that_a_run_refuses_ends_the_study(call, tmp_path):
    code, _, err = call(*SWEEP, mood="missing")
    assert code == 2 and "data.path is gone." in err and 1 <= len(lines(tmp_path / "out")) <= 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--vary=model.kin=gpt2"], "model.kind"),
        (["--vary=model.kind=gpt2,gpt9"], "'gpt9'; it takes one of"),
        (["--vary=model.kind"], "write --vary=KEY=VALUE"),
        (["--vary=model.heads=3,4"], "make the width a multiple"),
        (["--vary=model.kind=gpt2,gpt2"], "once"),
        (["--sweep=optim.lr=1"], "no key of the config"),
        (["--sweep=optim.learning_rate=1e-3,1e-3"], "once"),
        (["--sweep=optim.learning_rate=fast"], "'fast'"),
        (["--sweep=optim.name=adamw,muon"], "--vary"),
        (["--vary=train.seed=1,2"], "train.seed is set twice"),
        (["--vary=optim.clip=1", "--sweep=optim.clip=1,2"], "optim.clip is set twice"),
        (["--config.optim.schedule_steps=9"], "optim.schedule_steps is 9"),
        (["--config.data.validation_fraction=0"], "validation data"),
        (["--jobs=0"], "--jobs"),
        (["--together=2", "--sweep=optim.clip=1,2"], "--together is 2 with --sweep=optim.clip"),
        (["--rungs=2"], "--sweep or --finalists"),
        (["--finalists=2", "--vary=model.kind=gpt2,aether"], "--finalists is 2 of 2"),
        (["--cases=nowhere.toml"], "cannot be read as TOML"),
        ([f"--cases={CONFIG}"], "cannot be read as TOML"),
        ([f"--cases={ROOT}/pyproject.toml"], "is not a table of settings"),
        (["--table_only"], "holds no study"),
    ],
)
def test_wrong_input_is_told_before_anything_runs(call, tmp_path, words, said):
    code, _, err = call(*words)
    assert code == 2 and said in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_folder_holds_one_study(call):
    assert call(*SWEEP[:1], "--seeds=1")[0] == 0
    code, _, err = call(*SWEEP[:1], "--seeds=1", "--config.data.context=32")
    assert code == 2 and "data.context=64, this one 32" in err
    assert call(*SWEEP[:1], "--seeds=1", "--config.train.steps=6", "--config.checkpoint.every=3")[0] == 0


def test_jobs_share_the_cores(call, tmp_path):
    assert call("--seeds=2", "--jobs=2")[0] == 0
    used = {(folder / "starts").read_text() for folder in (tmp_path / "out").glob("shakespeare_char*")}
    assert used <= {f"{sorted(group)}\n" for group in runs.cpu_groups(2)}
    cores = sorted(os.sched_getaffinity(0))
    assert sorted(c for g in runs.cpu_groups(len(cores)) for c in g) == cores and all(runs.cpu_groups(99))


def test_mean_error_against_numpy(rng):
    values = rng.normal(size=5).tolist()
    expected = np.mean(values), np.std(values, ddof=1) / np.sqrt(5)
    np.testing.assert_allclose(tables.mean_error(values), expected, rtol=1e-12)
    assert tables.spread([1.0, np.inf]) == "diverged" and tables.spread([]) == "–" and tables.spread([1.0]) == "1.0000"


@pytest.mark.parametrize(("best", "end"), [(1.0, "smallest"), (2.0, ""), (3.0, "largest"), (None, "")])
def test_edge(best, end):
    assert tables.edge(best, [1.0, 2.0, 3.0]) == end and tables.edge(best, [2.0]) == ""


def started(command: list[str], marks: Path, count: int, **more) -> subprocess.Popen:
    """Start a command and return it once `count` of its runs have begun."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, **more)
    deadline = time.monotonic() + 30
    while len(list(marks.glob("*/ready"))) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return process


def test_sigterm_lets_the_runs_save_and_ends_with_75(call, tmp_path):
    main = f"import sys; sys.path[:0] = [{str(ROOT)!r}]\nfrom tools import study, study_runs as r\n"
    main += f"r.TRAIN = {runs.TRAIN!r}\nsys.exit(study.cli.run(study.main, study.define(), ''))"
    command = [
        sys.executable,
        "-c",
        main,
        f"--config={CONFIG}",
        "--config.train.steps=8",
        f"--out={tmp_path}/out",
        *SWEEP,
    ]
    process = started(command, tmp_path / "out", 2, env={**os.environ, "MOOD": "slow"})
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 75 and "the same command goes on" in err
    assert not (tmp_path / "out/results.jsonl").exists()
    assert call(*SWEEP)[0] == 0 and len(lines(tmp_path / "out")) == 12


def test_what_a_killed_study_left_is_waited_for(call, tmp_path):
    (tmp_path / "out").mkdir()
    with runs.sole_user(tmp_path / "out") as lock:
        orphan = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(1)"], pass_fds=[lock])
    begin = time.monotonic()
    code, _, err = call("--seeds=1")
    assert code == 0 and "waiting for another study" in err and time.monotonic() - begin > 0.5
    assert orphan.wait() == 0


@pytest.mark.slow
def test_real_runs(tmp_path):
    text = "".join(f"{i} little piggies went to market.\n" for i in range(500))
    (tmp_path / "text.txt").write_text(text)
    command = [sys.executable, "-m", "tools.study", f"--config={CONFIG}", f"--config.data.path={tmp_path}/text.txt"]
    command += ["--config.train.steps=3", "--config.model.layers=1", "--config.model.width=16", f"--out={tmp_path}/out"]
    command += ["--vary=model.kind=gpt2,aether", "--sweep=optim.learning_rate=1e-2", "--sweep_fraction=1", "--seeds=1"]
    done = subprocess.run([*command, "--jobs=2"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = {r["combination"]: r for r in lines(tmp_path / "out")}
    assert set(found) == {"kind=gpt2", "kind=aether"}
    for record in found.values():
        assert record["steps"] == 3 and 1 < record["loss"] < 5 and record["parameters"] > 1000
        assert f"{record['loss']:.4f}" in done.stdout
