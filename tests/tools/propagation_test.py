import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # tools/ is not installed
tool = importlib.import_module("tools.propagation")
cli = tool.cli

SMALL = ["--config.model.layers=2", "--config.model.width=16", "--config.model.heads=2", "--config.data.context=8"]


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run the tool on a small text; return exit code, stdout, stderr."""
    (tmp_path / "text.txt").write_text("".join(f"{i} little piggies went to market.\n" for i in range(200)))
    monkeypatch.setattr(cli, "prepare_environment", lambda debug: None)

    def call(*argv: str, kind: str = "aether", config: bool = True) -> tuple[int, str, str]:
        own = [f"--config={ROOT}/configs/shakespeare_char.py", f"--config.data.path={tmp_path}/text.txt", *SMALL]
        own += [f"--config.data.cache_dir={tmp_path}/cache", f"--config.model.kind={kind}"]
        code = cli.run(tool.main, tool.define(), tool.__doc__, [*(own if config else []), *argv])
        return code, *capsys.readouterr()

    return call


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.mark.parametrize("kind", ["aether", "gpt2"])
def test_a_row_for_each_block_and_parameter(call, kind):
    code, out, err = call("--parameters", kind=kind)
    assert code == 0, err
    blocks, parameters, loss = ([cells(row) for row in table.splitlines()] for table in out.strip().split("\n\n"))
    assert blocks[0][1:7] == ["stream", "attention", "mlp", "added", "gradient", "entropy"]
    units = ["attention distance_50", "attention alignment", "mlp.hidden distance_50", "mlp.hidden alignment"]
    assert blocks[0][7:] == (units if kind == "aether" else [])
    assert [row[0] for row in blocks[2:]] == ["blocks.0", "blocks.1"]
    stream = float(blocks[2][1])
    assert stream == pytest.approx(2**0.5 * (1.0 if kind == "aether" else 0.02), rel=0.25)
    kernel = next(row for row in parameters if row[0] == "blocks/mlp/hidden/kernel")
    assert float(kernel[1]) == pytest.approx(0.25 if kind == "aether" else 0.02, rel=0.1)
    assert float(kernel[3]) == pytest.approx(float(kernel[2]) / float(kernel[1]), rel=0.02)
    assert float(loss[0][0].split()[-2]) == pytest.approx(np.log(30), abs=0.5)


@pytest.mark.slow
def test_networks_of_several_widths_are_trained_and_drawn(call, tmp_path):
    out_file = tmp_path / "coordinates.png"
    code, out, err = call("--vary=model.width=8,16", "--steps=2", f"--out={out_file}", "--config.optim.warmup_steps=0")
    assert code == 0, err
    head, _, narrow, wide, exponents = map(cells, out.strip().splitlines())
    assert head[0] == "model.width" and [narrow[0], wide[0], exponents[0]] == ["8", "16", "exponent"]
    at = head.index("logits before")
    before, after = float(wide[at]), float(wide[at + 1])
    assert after > before > 0, "training makes the logits larger"
    assert float(exponents[at]) == pytest.approx(np.log2(before / float(narrow[at])), abs=0.02)
    assert out_file.stat().st_size > 10_000


@pytest.mark.slow
def test_a_trained_run_is_looked_at_as_it_is(call, tmp_path):
    from aether.train.loop import train
    from launch.overrides import make_config

    words = [w.removeprefix("--config.") for w in SMALL] + [f"data.path={tmp_path}/text.txt", "train.steps=3"]
    words += [f"data.cache_dir={tmp_path}/cache", "data.batch_size=16", "optim.warmup_steps=0", "train.sample_tokens=0"]
    train(make_config(f"{ROOT}/configs/shakespeare_char.py", words), str(tmp_path / "run"))
    code, out, err = call(f"--workdir={tmp_path}/run", config=False)
    assert code == 0, err
    fresh = call("--config.data.batch_size=16")[1]
    assert out.splitlines()[0] == fresh.splitlines()[0] and out != fresh
    loss, before = (float(text.strip().split()[-2]) for text in (out, fresh))
    assert loss < before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--vary=model.width"], "write --vary=KEY=VALUE"),
        (["--vary=model.kind=gpt2,aether"], "--vary names model.kind, which is not a number."),
        (["--steps=0"], "--steps"),
        (["--workdir=nowhere"], "whose config is known"),
    ],
)
def test_wrong_input(call, words, said):
    code, _, err = call(*words)
    assert code == 2 and said in err and err.strip().count("\n") == 0
