import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # tools/ is not installed
tool, plans, study = (importlib.import_module(f"tools.{name}") for name in ("scaling", "study_plan", "study"))
cli = tool.cli

LAWS = {
    "kind=gpt2": tool.Law(1.2, 60.0, 0.34, 300.0, 0.42),
    "kind=aether": tool.Law(1.1, 55.0, 0.35, 280.0, 0.44),
}
PARAMETERS = {64: 2e5, 128: 8e5, 256: 3.2e6, 512: 12.7e6}
PER_STEP = 64 * 12
WORDS = ["--vary=model.kind=gpt2,aether", "--vary=model.width=64,128,256,512", "--vary=train.steps=500,2000,8000"]


@pytest.fixture
def folder(tmp_path):
    """A function (noise, which runs) -> a study's folder whose losses follow `LAWS`."""

    def make(noise: float = 0.0, keep=lambda job: True) -> Path:
        args = study.define()
        cli.parse(args, [f"--config={ROOT}/configs/shakespeare_char.py", "--seeds=2", f"--out={tmp_path}", *WORDS])
        made, rng = plans.plan(args), np.random.default_rng(0)
        (tmp_path / "study.json").write_text(json.dumps(asdict(made)))
        with (tmp_path / "results.jsonl").open("w") as file:
            for c in made.combinations:
                width = int(c.overrides[1].partition("=")[2])
                for job in filter(keep, made.full(c, {})):
                    loss = LAWS[c.group](PARAMETERS[width], PER_STEP * job.steps) * np.exp(noise * rng.normal())
                    record = dict(run=job.name, status="done", loss=loss, parameters=PARAMETERS[width])
                    file.write(json.dumps(record) + "\n")
        return tmp_path

    return make


def test_the_law_that_made_the_losses_is_found(folder):
    groups = tool.runs_of(folder())
    assert {name: len(runs) for name, runs in groups.items()} == dict.fromkeys(LAWS, 24)
    for name, law in LAWS.items():
        found = tool.fit(groups[name])
        np.testing.assert_allclose(found, law, rtol=0.02)
        np.testing.assert_allclose(found(162e6, 2.5e9), law(162e6, 2.5e9), rtol=1e-3)


def test_intervals_hold_the_truth_and_shrink_with_the_noise(folder):
    widths = []
    for noise in (1e-3, 4e-3):
        groups = tool.runs_of(folder(noise))
        laws = {name: tool.fit(runs) for name, runs in groups.items()}
        drawn = tool.bootstrap(groups, laws, 60, np.random.default_rng(1))
        at = [[laws[name](162e6, 2.5e9) for laws in drawn] for name in LAWS]
        difference = np.subtract(at[1], at[0])
        truth = LAWS["kind=aether"](162e6, 2.5e9) - LAWS["kind=gpt2"](162e6, 2.5e9)
        low, high = np.percentile(difference, (1, 99))
        assert low < truth < high
        widths.append(high - low)
    assert widths[1] > 1.5 * widths[0]


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = cli.run(tool.main, tool.define(), tool.__doc__, list(argv))
    return code, *capsys.readouterr()


def test_tables_and_picture(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "prepare_environment", lambda debug: None)
    out = tmp_path / "scaling.png"
    argv = [f"--study={folder(1e-3)}", "--at=124m:162e6:2.5e9", "--draws=20", f"--png={out}"]
    code, text, err = run(capsys, *argv)
    assert code == 0, err
    laws, points = text.strip().split("\n\n")
    assert "kind=gpt2" in laws and "kind=aether − kind=gpt2" in points
    row = [cell.strip() for cell in points.splitlines()[2].strip("|").split("|")]
    assert row[0] == "124m" and float(row[3].split()[0]) == pytest.approx(LAWS["kind=gpt2"](162e6, 2.5e9), abs=0.05)
    assert float(row[5].split()[0]) == pytest.approx(float(row[4].split()[0]) - float(row[3].split()[0]), abs=2e-3)
    assert out.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--study is missing"),
        (["--study=nowhere"], "--study is nowhere, which holds no study"),
        (["--study=.", "--at=124m:162e6"], "write NAME:PARAMETERS:TOKENS"),
        (["--study=.", "--at=124m:many:1"], "write NAME:PARAMETERS:TOKENS"),
    ],
)
def test_wrong_input(argv, said, capsys, monkeypatch):
    monkeypatch.setattr(cli, "prepare_environment", lambda debug: None)
    code, _, err = run(capsys, *argv)
    assert code == 2 and said in err and err.strip().count("\n") == 0


def test_too_few_runs_are_refused(folder, capsys, monkeypatch):
    monkeypatch.setattr(cli, "prepare_environment", lambda debug: None)
    code, _, err = run(capsys, f"--study={folder(keep=lambda job: 'width=64' in job.name)}")
    assert code == 2 and "of 1 sizes and 3 lengths" in err
    code, _, err = run(capsys, f"--study={folder(keep=lambda job: False)}")
    assert code == 2 and "no whole run" in err
