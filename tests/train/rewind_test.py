"""Runs that go back from a loss spike: what they leave out, and that they may be killed anywhere on the way."""

import json
from functools import partial

import jax
import numpy as np
import pytest

from aether import parallel
from aether.checkpoint import Checkpoints
from aether.config import build
from aether.errors import CheckError
from aether.parallel import make_mesh
from aether.testing import tiny_text
from aether.train import loop
from aether.train.loop import train
from aether.train.spikes import LEFT_OUT, LeftOut


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    return dict(
        model=dict(layers=1, heads=2, width=16, dtype="float32"),
        data=dict(path=str(tiny_text(tmp_path_factory.mktemp("text"))), context=8, batch_size=4),
        optim=dict(learning_rate=3e-2, rates="one", warmup_steps=4, schedule="constant"),
        train=dict(steps=40, eval_every=0, sample_tokens=0, eval_batches=1),
        checkpoint=dict(every=8),
        faults=dict(spike_sigma=3.5, spike_window=4, spike_action="rewind", max_rewinds=20),
    )


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(parallel, "make_mesh", partial(make_mesh, devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def undisturbed(values, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "make_mesh", partial(make_mesh, devices=jax.devices()[:1]))
        train(build(values), str(folder))
    return folder


def lines(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in found if line["split"] == "train"}


def test_a_run_that_went_back_says_so_and_is_whole(undisturbed):
    found = json.loads((undisturbed / LEFT_OUT).read_text())
    assert found["rewinds"] > 1 and all(at % 8 == 0 and count > 4 for at, count in found["entries"])
    assert sorted(lines(undisturbed)) == list(range(1, 41))
    flights = list((undisturbed / "flight").glob("process-0-*-spike.jsonl"))
    assert flights
    dumped = [json.loads(line) for line in flights[-1].read_text().splitlines()]
    assert dumped[0]["reason"] == "spike" and dumped[-1]["spike"] == 1
    assert dumped[-1]["ids"] and dumped[-1]["batch"] >= dumped[-1]["step"] - 1


SLOW = [pytest.param(moment, marks=pytest.mark.slow) for moment in ("before", "between", "later")]


@pytest.mark.parametrize("moment", ["after", *SLOW])
def test_a_run_killed_on_the_way_ends_as_one_left_alone(values, undisturbed, tmp_path, monkeypatch, moment):
    """Before the newer checkpoints are gone, between that and the record, after the record, and four batches later."""
    calls = {"before": (Checkpoints, "drop_after"), "between": (LeftOut, "save"), "after": (loop, "replace")}
    owner, name = calls.get(moment, (LeftOut, "batches"))
    whole, count = getattr(owner, name), []

    def dying(*args, **kwargs):
        count.append(0)
        if moment != "later":
            raise Killed
        return failing(whole(*args, **kwargs)) if len(count) == 2 else whole(*args, **kwargs)

    def failing(batches):
        for _ in range(4):
            yield next(batches)
        raise Killed

    monkeypatch.setattr(owner, name, dying)
    with pytest.raises(Killed):
        train(build(values), str(tmp_path / "run"))
    monkeypatch.setattr(owner, name, whole)
    train(build(values), str(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / LEFT_OUT).read_text()) == json.loads((undisturbed / LEFT_OUT).read_text())
    assert lines(tmp_path / "run") == lines(undisturbed)
    arrays = [Checkpoints(str(f / "checkpoints"), build(values).checkpoint) for f in (undisturbed, tmp_path / "run")]
    like = loop_state(values)
    states = [c.restore(like, 40)[0] for c in arrays]
    jax.tree.map(np.testing.assert_array_equal, *states)


def loop_state(values):
    from aether.train.setup import describe_state

    config = build(values).resolved(257)
    return describe_state(config, make_mesh(config.mesh, jax.devices()[:1]))[2]


def test_rewinds_come_to_an_end(values, tmp_path):
    few = build(values | dict(faults=values["faults"] | dict(max_rewinds=1)))
    with pytest.raises(CheckError, match=r"is a spike \(faults.spike_sigma is 3.5\) and the run has gone back 1 times"):
        train(few, str(tmp_path / "run"))


def test_without_a_checkpoint_a_spike_is_only_skipped(values, tmp_path, capsys):
    alone = build(values | dict(checkpoint=dict(every=0)))
    train(alone, str(tmp_path / "run"))
    assert "there is no checkpoint 5 steps before it to go back to; going on" in capsys.readouterr().err
    assert not (tmp_path / "run" / LEFT_OUT).exists()


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_on_the_way_back(values, tmp_path, monkeypatch, capsys):
    """The newest one before the spike is damaged: the one before it serves, and the batches since are left out too."""
    before, told = Checkpoints.before, []

    def damaging(self, step):
        found = before(self, step)
        if not told and found and found > 4:
            told.append(found)
            (tmp_path / "run" / "checkpoints" / str(found) / "meta.json").write_text("{")
        return found

    monkeypatch.setattr(Checkpoints, "before", damaging)
    train(build(values | dict(checkpoint=dict(every=4, keep_last=10))), str(tmp_path / "run"))
    assert told, "no spike came after two checkpoints"
    assert f"Checkpoint {told[0]} in " in (said := capsys.readouterr().err) and "Trying the one before it." in said
    assert f" to {told[0] - 4}; batches" in said
    entries = json.loads((tmp_path / "run" / LEFT_OUT).read_text())["entries"]
    assert any(at == told[0] - 4 for at, _ in entries) and sorted(lines(tmp_path / "run")) == list(range(1, 41))
