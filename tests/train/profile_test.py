"""Traces of some steps."""

from functools import partial

import jax
import pytest

from aether import parallel
from aether.config import build
from aether.testing import tiny_text
from aether.train import loop


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "make_mesh", partial(parallel.make_mesh, devices=jax.devices()[:1]))

    def make(steps, span):
        return build(
            dict(
                model=dict(layers=1, heads=2, width=8, dtype="float32"),
                data=dict(path=str(tiny_text(tmp_path, 200)), context=8, batch_size=4, validation_fraction=0.0),
                optim=dict(schedule_steps=5),
                train=dict(steps=steps, profile_steps=span, sample_tokens=0, eval_every=0),
            )
        )

    return make


def test_a_trace_of_the_steps_asked_for(config, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(("start", folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop",)))
    batches = loop.train_batches

    def counted(*args, **kwargs):
        for number, batch in enumerate(batches(*args, **kwargs), 1):
            calls.append(number)
            yield batch

    monkeypatch.setattr(loop, "train_batches", counted)
    loop.train(config(5, "1:3"), str(tmp_path / "run"))
    folder = str(tmp_path / "run" / "profile")
    assert calls == [1, ("start", folder), 2, 3, ("stop",), 4, 5]
    assert f"trace of steps 2 to 3 in {folder}" in capsys.readouterr().err


def test_a_trace_that_reaches_to_the_end_is_written(config, tmp_path):
    loop.train(config(3, "1:10"), str(tmp_path / "run"))
    (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000
