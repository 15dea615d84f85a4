"""The loop, in this process: what it writes down, how it stops and goes on, what it does with bad steps."""

import json
import math
import os
import signal
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from flax import nnx

from aether import parallel
from aether.checkpoint import Checkpoints
from aether.config import CheckpointConfig, MeshConfig, build
from aether.data.corpus import load_corpus
from aether.data.loader import batch_ids, evaluation_batches, train_batches
from aether.errors import CheckError, InputError, Stopped
from aether.losses import LOSSES
from aether.parallel import make_mesh
from aether.testing import tiny_text
from aether.train import evaluator, loop
from aether.train.meter import named
from aether.train.setup import describe_state
from aether.workdir import Workdir

ROUGH = {"tokens_per_second", "mfu", "data_wait"}  # times and rates, which differ from run to run


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(parallel, "make_mesh", partial(make_mesh, devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny_text(tmp_path_factory.mktemp("text"), 600)


def settings(text, **overrides):
    """Return the config of six steps of a layer of width 16, evaluated and saved after every second one.

    Most tests change what is no part of the compiled programs, so that these are shared.
    """
    values = dict(
        model=dict(layers=1, heads=2, width=16, vocab=258, dtype="float32"),
        data=dict(path=str(text), context=16, batch_size=8),
        optim=dict(learning_rate=1e-2, warmup_steps=2, schedule_steps=6),
        train=dict(steps=6, eval_every=2, sample_tokens=0, ema=0.6),
        checkpoint=dict(every=2, keep_last=100),
    )
    for section, content in overrides.items():
        values[section] = {**values.get(section, {}), **content}
    return build(values)


def lines(folder: Path) -> dict[tuple[int, str], dict]:
    """Return the lines of metrics.jsonl by (step, split), each of which stands there once."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {(r["step"], r["split"]): r for r in records}
    assert len(found) == len(records), "a (step, split) stands there twice"
    return found


def exact(folder: Path) -> dict:
    return {k: {n: v for n, v in line.items() if n not in ROUGH} for k, line in lines(folder).items()}


def losses(folder: Path) -> list[float]:
    return [line["loss"] for (_, split), line in sorted(lines(folder).items()) if split == "train"]


def load(config, folder: Path, step: int | None = None):
    """Return (resolved config, graph, state) of a checkpoint, the last by default."""
    config = config.resolved(load_corpus(config.data).tokenizer.vocab_size)
    graph, _, like = describe_state(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    state, _, _ = Checkpoints(str(folder / "checkpoints"), CheckpointConfig()).restore(like, step)
    return config, graph, state


def assert_equal(a, b) -> None:
    left, right = jax.tree_util.tree_flatten_with_path(a)[0], jax.tree_util.tree_flatten_with_path(b)[0]
    assert [p for p, _ in left] == [p for p, _ in right]
    for (path, x), (_, y) in zip(left, right, strict=True):
        assert np.array_equal(x, y), jax.tree_util.keystr(path)


def sums(graph, params, batch) -> tuple[float, int, float]:
    """Return summed nats, right guesses and scored tokens of a batch, by a full softmax in float64."""
    model = nnx.merge(graph, params)
    inputs = {k: batch[k][:, :-1] for k in ("tokens", "segments", "positions")}
    hidden, _ = model(inputs["tokens"], segments=inputs["segments"], positions=inputs["positions"])
    logits = np.asarray(hidden @ model.head_kernel()[:, : model.vocab], np.float64)
    targets, mask = batch["tokens"][:, 1:], batch["mask"]
    nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return (nats * mask).sum(), ((logits.argmax(-1) == targets) * mask).sum(), mask.sum()


def whole(graph, params, batches) -> tuple[float, int, float]:
    return tuple(np.sum([sums(graph, params, batch) for batch in batches], 0))


# --- what is written down


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """A plain run of six steps with two validation sets: (config, folder)."""
    folder = tmp_path_factory.mktemp("plain")
    other = folder.parent / "other.txt"
    other.write_text("the line says äöü and what comes next.\n" * 9, encoding="utf-8")
    config = settings(text, data=dict(validation=dict(same=str(text), other=str(other))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "make_mesh", partial(make_mesh, devices=jax.devices()[:1]))
        loop.train(config, str(folder))
    return config, folder


def test_lines_stand_at_every_step(run):
    _, folder = run
    found = lines(folder)
    assert {s for s, split in found if split == "train"} == set(range(1, 7))
    assert {(s, split) for s, split in found if split != "train"} == {
        (s, n) for s in (2, 4, 6) for n in ("same", "other")
    }
    for (_, split), line in found.items():
        names = {"loss", "accuracy", "tokens"}
        names |= (
            {"learning_rate", "grad_norm", "tokens_per_second", "mfu", "data_wait", "skipped"}
            if split == "train"
            else {"perplexity", "bits_per_byte"}
        )
        assert names <= set(line), names - set(line)
    assert all(found[s, "train"]["tokens"] == 8 * 16 and found[s, "train"]["mfu"] is None for s in range(1, 7))
    assert all(found[s, "train"]["tokens_per_second"] > 0 for s in range(1, 7))
    rates = [found[s, "train"]["learning_rate"] for s in range(1, 7)]
    assert rates[:2] == pytest.approx([0.005, 0.01]) and rates[1:] == sorted(rates[1:], reverse=True)


@pytest.mark.parametrize("step", [3, 5])
def test_train_loss_is_that_of_the_batch_before_its_update(run, step):
    config, folder = run
    resolved, graph, state = load(config, folder, step - 1)
    batch = next(train_batches(load_corpus(config.data).train, resolved.data, resolved.train.seed, step - 1))
    nats, right, tokens = sums(graph, state.params, batch)
    line = lines(folder)[step, "train"]
    assert line["loss"] == pytest.approx(nats / tokens, abs=1e-5)
    assert line["accuracy"] == pytest.approx(right / tokens)


def test_first_loss_is_that_of_the_initial_parameters(run):
    config, folder = run
    corpus = load_corpus(config.data)
    graph, make, _ = describe_state(config.resolved(257), make_mesh(MeshConfig(), jax.devices()[:1]))
    nats, _, tokens = sums(graph, jax.jit(make)().params, next(train_batches(corpus.train, config.data, 0)))
    assert lines(folder)[1, "train"]["loss"] == pytest.approx(nats / tokens, abs=1e-5)


@pytest.mark.parametrize("name", ["same", "other"])
def test_validation_is_the_whole_text(run, name):
    config, folder = run
    _, graph, state = load(config, folder, 4)
    batches = list(evaluation_batches(load_corpus(config.data).validation[name], config.data))
    nats, right, tokens = whole(graph, state.ema, batches)
    size = os.path.getsize(config.data.validation[name])
    line = lines(folder)[4, name]
    assert tokens == size == line["tokens"], "each byte is scored once, end of text never"
    assert line["loss"] == pytest.approx(nats / tokens, abs=1e-5)
    assert line["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert line["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, abs=1e-5)
    assert line["accuracy"] == pytest.approx(right / tokens)
    raw, _, _ = whole(graph, state.params, batches)
    assert abs(raw - nats) / tokens > 1e-3, "the averaged parameters are evaluated"


def test_tensorboard_holds_the_same_losses(run):
    from tensorboardX.proto.event_pb2 import Event

    _, folder = run
    found = {}
    for path in (folder / "tensorboard").iterdir():
        data = path.read_bytes()
        while data:  # records of TFRecord: length, 4 bytes of checksum, the event, 4 bytes of checksum
            size = int.from_bytes(data[:8], "little")
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
    for (step, split), line in lines(folder).items():
        assert found[step, f"{split}/loss"] == pytest.approx(line["loss"], rel=1e-6)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_fewer_lines(text, tmp_path, one_device):
    config = settings(text, train=dict(steps=7, log_every=3, eval_every=0), checkpoint=dict(every=0))
    loop.train(config, str(tmp_path))
    assert sorted(lines(tmp_path)) == [(3, "train"), (6, "train"), (7, "train"), (7, "validation")]
    assert os.listdir(tmp_path / "checkpoints") == ["7"]


# --- going on


BUSY = dict(
    model=dict(dropout=0.1),
    data=dict(segments=True),
    train=dict(eval_every=2, sample_tokens=3, sample_prompt="th"),
)


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    config = settings(text, **BUSY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "make_mesh", partial(make_mesh, devices=jax.devices()[:1]))
        loop.train(config, str(folder))
    return config, folder, exact(folder), load(config, folder)[2]


def signalling(function, number: int, at: int):
    """Wrap a function that makes an iterator, to send a signal to this process before it yields item `at` of all."""
    count = [0]

    def wrapped(*args, **kwargs):
        for item in function(*args, **kwargs):
            count[0] += 1
            if count[0] == at:
                os.kill(os.getpid(), number)
            yield item

    return wrapped


STOPS = {  # where the signal comes -> (module, its iterator, item, step at which the run is saved)
    "before the first step": (loop, "train_batches", 1, 1),
    "between evaluations": (loop, "train_batches", 3, 3),
    "at a step to be evaluated and saved": (loop, "train_batches", 4, 4),
    "within an evaluation": (evaluator, "evaluation_batches", 2, 2),
    "at the last step": (loop, "train_batches", 6, 6),
}


@pytest.mark.parametrize(
    ("where", "number"), [*((where, signal.SIGTERM) for where in STOPS), ("between evaluations", signal.SIGINT)]
)
def test_a_stopped_run_goes_on_as_if_undisturbed(undisturbed, tmp_path, one_device, monkeypatch, where, number):
    config, _, expected, end = undisturbed
    module, name, at, step = STOPS[where]
    with monkeypatch.context() as patch:
        patch.setattr(module, name, signalling(getattr(module, name), number, at))
        with pytest.raises(Stopped, match=f"by {signal.Signals(number).name} and saved at step {step} of 6"):
            loop.train(config, str(tmp_path))
    assert max(map(int, os.listdir(tmp_path / "checkpoints"))) == step
    assert (step, "validation") not in lines(tmp_path), "the evaluation was given up"
    loop.train(config, str(tmp_path))
    assert exact(tmp_path) == expected
    assert_equal(load(config, tmp_path)[2], end)


def test_a_signal_between_evaluation_and_save(undisturbed, tmp_path, one_device, monkeypatch):
    config, _, expected, end = undisturbed
    config = settings(config.data.path, **BUSY | {"checkpoint": dict(every=0)})

    def curves(self):
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Reporter, "curves", curves)
        with pytest.raises(Stopped, match="saved at step 2 of 6"):
            loop.train(config, str(tmp_path))
    assert os.listdir(tmp_path / "checkpoints") == ["2"] and (2, "validation") in lines(tmp_path)
    loop.train(config, str(tmp_path))
    assert exact(tmp_path) == expected
    assert_equal(load(config, tmp_path)[2], end)


def test_a_signal_after_the_last_evaluation_changes_nothing(undisturbed, tmp_path, one_device, monkeypatch, capsys):
    config, _, expected, _ = undisturbed
    monkeypatch.setattr(loop, "finished", lambda workdir: os.kill(os.getpid(), signal.SIGTERM) or "at the end")
    loop.train(config, str(tmp_path))
    assert exact(tmp_path) == expected
    assert "at the end" in capsys.readouterr().err


def test_only_the_missing_set_is_evaluated_again(text, tmp_path, one_device, monkeypatch):
    config = settings(text, data=dict(validation=dict(a=str(text), b=str(text))))
    with monkeypatch.context() as patch:  # the second set's first batch
        patch.setattr(evaluator, "evaluation_batches", signalling(evaluator.evaluation_batches, signal.SIGTERM, 30))
        with pytest.raises(Stopped, match="saved at step 2"):
            loop.train(config, str(tmp_path))
    found = lines(tmp_path)
    assert (2, "a") in found and (2, "b") not in found
    loop.train(config, str(tmp_path))
    assert set(lines(tmp_path)) >= {(s, n) for s in (2, 4, 6) for n in "ab"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_start(text, tmp_path, one_device, monkeypatch, number):
    def load_corpus(*args, **kwargs):
        os.kill(os.getpid(), number)
        raise AssertionError("the signal did not interrupt")

    monkeypatch.setattr("aether.train.setup.open_corpus", load_corpus)
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"{signal.Signals(number).name} during the start"):
        loop.train(settings(text), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists() and signal.getsignal(number) is before


def test_a_second_ctrl_c_interrupts(text, tmp_path, one_device, monkeypatch):
    def impatient(*args, **kwargs):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        yield

    monkeypatch.setattr(loop, "train_batches", impatient)
    with pytest.raises(KeyboardInterrupt):
        loop.train(settings(text), str(tmp_path))


def test_the_workdir_is_held_until_the_end(text, tmp_path, one_device, monkeypatch):
    monkeypatch.setattr("aether.workdir.PATIENCE", 0.0)

    def interrupted(*args, **kwargs):
        with pytest.raises(InputError, match=f"pid {os.getpid()} on"), Workdir(str(tmp_path)).alone(print):
            pass
        yield  # a batch that is none

    monkeypatch.setattr(loop, "train_batches", interrupted)
    with pytest.raises(AttributeError) as caught:
        loop.train(settings(text), str(tmp_path))
    with Workdir(str(tmp_path)).alone(print):
        assert caught.tb  # whose frames hold what the training held


# --- steps that are not finite


@pytest.mark.parametrize("log_every", [1, 100])
def test_too_many_bad_steps_end_the_run(text, tmp_path, one_device, log_every):
    optim = dict(learning_rate=1e30, warmup_steps=0, clip=0.0, weight_decay=0.0)
    config = settings(text, optim=optim, train=dict(max_skipped=3, log_every=log_every, eval_every=0, steps=50))
    with pytest.raises(CheckError) as caught:
        loop.train(config, str(tmp_path))
    message = str(caught.value)
    corpus = load_corpus(config.data)
    for step in (2, 3, 4):
        assert f"step {step}: {' '.join(batch_ids(corpus.train, config.data, 0, step - 1))}" in message
    assert "step 5" not in message and "train.max_skipped is 3" in message and "\n" not in message
    found = lines(tmp_path)
    assert [found[s, "train"]["skipped"] for s in (2, 3, 4)] == [1, 2, 3]
    assert all(found[s, "train"]["loss"] is None or found[s, "train"]["grad_norm"] is None for s in (2, 3, 4))


def test_a_bad_step_is_skipped_and_counted(text, tmp_path, one_device, monkeypatch, capsys):
    config = settings(text, checkpoint=dict(every=1), train=dict(eval_every=0, max_skipped=2))
    bad = next(train_batches(load_corpus(config.data).train, config.data, 0, 2))["tokens"]

    def loss(model, batch, key, lm=LOSSES["lm"], **options):
        total, found = lm(model, batch, key, **options)
        nan = jnp.where(jnp.array_equal(batch["tokens"], bad), jnp.nan, 1.0)
        return total * nan, found | {"nll": found["nll"] * nan}

    monkeypatch.setitem(LOSSES, "lm", loss)
    loop.train(config, str(tmp_path))
    two, three, six = (load(config, tmp_path, s)[2] for s in (2, 3, 6))
    assert_equal((two.params, two.opt_state, two.ema), (three.params, three.opt_state, three.ema))
    assert (three.step, three.skipped, three.skipped_in_a_row) == (3, 1, 1)
    assert (six.step, six.skipped, six.skipped_in_a_row) == (6, 1, 0)
    found = lines(tmp_path)
    assert [found[s, "train"]["skipped"] for s in range(1, 7)] == [0, 0, 1, 1, 1, 1]
    assert found[3, "train"]["loss"] is None and "loss" in found[3, "train"]["nonfinite"]
    assert "step 3: the loss or gradient is not finite; update skipped (1 in a row)" in capsys.readouterr().err


def test_many_ids_are_cut_short():
    assert named(["a", "b"]) == "a b"
    assert named([str(i) for i in range(20)], 3) == "0 1 2 and 17 more"


# --- every way to run


def test_the_mesh_changes_nothing(text, tmp_path, request):
    mesh = dict(data=2, fsdp=2, tensor=2)
    loop.train(settings(text, mesh=mesh), str(tmp_path / "eight"))
    loop.train(settings(text, mesh=mesh, train=dict(steps=4)), str(tmp_path / "both"))
    request.getfixturevalue("one_device")
    loop.train(settings(text), str(tmp_path / "one"))
    loop.train(settings(text), str(tmp_path / "both"))
    one = losses(tmp_path / "one")
    assert losses(tmp_path / "eight") == pytest.approx(one, abs=1e-5)
    assert losses(tmp_path / "both") == pytest.approx(one, abs=1e-5)
    assert one[-1] < one[0]


def test_accumulation_changes_nothing(text, tmp_path, one_device):
    for pieces in (1, 4):
        loop.train(settings(text, train=dict(accumulate=pieces)), str(tmp_path / str(pieces)))
    assert losses(tmp_path / "4") == pytest.approx(losses(tmp_path / "1"), abs=1e-5)


@pytest.mark.parametrize(
    "overrides",
    [
        dict(optim=dict(name="muon", schedule="wsd"), train=dict(z_loss=1e-3, accumulate=2)),
        dict(optim=dict(schedule="linear", lr_scale={"embed": 0.5}), model=dict(kind="gpt2", dropout=0.1)),
        dict(optim=dict(schedule="constant", clip=0.0), model=dict(dtype="bfloat16", remat="full")),
        dict(data=dict(workers=1), train=dict(eval_batches=1)),
        dict(data=dict(validation_fraction=0.0)),
    ],
    ids=["muon", "gpt2", "bfloat16", "workers", "no validation"],
)
def test_every_choice_trains(text, tmp_path, one_device, overrides):
    flags.FLAGS.mark_as_parsed()  # for Grain's workers
    loop.train(settings(text, **overrides | {"train": dict(steps=12) | overrides.get("train", {})}), str(tmp_path))
    found = losses(tmp_path)
    assert len(found) == 12 and np.mean(found[-3:]) < np.mean(found[:3])


def test_wandb_offline(text, tmp_path, one_device, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    loop.train(settings(text, train=dict(wandb="aether-tests", steps=2)), str(tmp_path))
    (recorded,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert recorded.stat().st_size > 0 and losses(tmp_path)
