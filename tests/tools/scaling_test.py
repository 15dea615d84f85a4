import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from aether.errors import InputError

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
    """A function (noise, which runs, words, name) -> a study's folder whose losses follow `LAWS`."""

    def make(noise: float = 0.0, keep=lambda job: True, words=WORDS, name="study") -> Path:
        args, out = study.define(), tmp_path / name
        cli.parse(args, [f"--config={ROOT}/configs/shakespeare_char.py", "--seeds=2", f"--out={out}", *words])
        made, rng = plans.plan(args), np.random.default_rng(0)
        out.mkdir(exist_ok=True)
        (out / "study.json").write_text(json.dumps(asdict(made)))
        with (out / "results.jsonl").open("w") as file:
            for c in made.combinations:
                chosen = dict(override.split("=") for override in c.overrides)
                n = PARAMETERS[int(chosen["model.width"])]
                for job in filter(keep, made.full(c, {})):
                    law = LAWS[f"kind={chosen['model.kind']}"]
                    loss = law(n, PER_STEP * job.steps) * np.exp(noise * rng.normal())
                    file.write(json.dumps(dict(run=job.name, status="done", loss=loss, parameters=n)) + "\n")
        return out

    return make


def test_the_law_that_made_the_losses_is_found(folder):
    groups = tool.runs_of([folder()])
    assert {name: len(runs) for name, runs in groups.items()} == dict.fromkeys(LAWS, 24)
    for name, law in LAWS.items():
        found = tool.fit(groups[name])
        np.testing.assert_allclose(found, law, rtol=0.02)
        np.testing.assert_allclose(found(162e6, 2.5e9), law(162e6, 2.5e9), rtol=1e-3)


def test_parts_of_a_grid_are_put_together_by_a_key(folder, tmp_path):
    """Widths as cases in one part, of one kind each in the others: the same runs as of the whole grid, paired alike."""
    (tmp_path / "cases.toml").write_text("".join(f'[w{w}]\n"model.width" = {w}\n' for w in (64, 128)))
    parts = [folder(words=[f"--cases={tmp_path}/cases.toml", WORDS[0], WORDS[2]], name="cases")]
    for kind in ("gpt2", "aether"):
        words = [f"--vary=model.kind={kind}", "--vary=model.width=256,512", WORDS[2]]
        parts.append(folder(words=words, name=kind))
    whole, together = tool.runs_of([folder()]), tool.runs_of(parts, "model.kind")
    assert list(together) == list(LAWS)
    for name in LAWS:
        assert sorted(run[1:] for run in together[name]) == sorted(run[1:] for run in whole[name])
    assert {run.place for run in together["kind=gpt2"]} == {run.place for run in together["kind=aether"]}
    with pytest.raises(InputError, match="--by is model.heads, which w64,kind=gpt2,steps=500 does not set"):
        tool.runs_of(parts, "model.heads")


def test_intervals_hold_the_truth_and_shrink_with_the_noise(folder):
    widths = []
    for noise in (1e-3, 4e-3):
        groups = tool.runs_of([folder(noise)])
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
