"""Spikes against NumPy, and the function from updates to batches against a run played by hand."""

import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aether.testing import tiny_batch, tiny_config
from aether.train.spikes import LEFT_OUT, LeftOut, empty_window, is_spike, pushed
from aether.workdir import Workdir


def test_a_spike_is_sigma_deviations_above_the_mean_of_a_full_window(rng):
    window, losses = empty_window(8), rng.normal(3.0, 0.1, 40).astype(np.float32)
    losses[[20, 33]] += 1.0
    kept, found = [], []
    for i, loss in enumerate(losses):
        last = np.array(kept[-8:], np.float64)
        want = len(kept) >= 8 and loss > last.mean() + 4 * last.std()
        assert bool(is_spike(window, jnp.float32(loss), 4.0)) == want
        if want:
            found.append(i)
        else:
            window, kept = pushed(window, jnp.float32(loss)), [*kept, loss]
    assert {20, 33} <= set(found) and len(found) < 6
    np.testing.assert_array_equal(window, np.array(kept[-8:]))
    assert not is_spike(window.at[0].set(jnp.nan), jnp.float32(1e9), 4.0)


@pytest.mark.parametrize("sigma", [0.0, 3.0])
def test_the_step_skips_a_spike_and_only_that(trainer, rng, sigma):
    """Batch 14 is of other tokens, whose losses are higher once the model has learned a little."""
    config = tiny_config(faults=dict(spike_sigma=sigma, spike_window=4))
    state, step = trainer(config)
    assert (state.window is None) == (sigma == 0.0)
    spikes = []
    for i in range(16):
        batch = {k: jnp.asarray(v) for k, v in tiny_batch(config, i).items()}
        if i == 14:
            batch["tokens"] = jnp.asarray(rng.integers(0, 32, batch["tokens"].shape), jnp.int32)
        before = jax.tree.map(jnp.copy, state.params)
        window = None if state.window is None else np.asarray(state.window)
        state, metrics = step(state, batch)
        changed = any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), before, state.params)))
        spike = sigma and i >= 4 and float(metrics["loss"]) > window.mean() + sigma * window.std()
        assert changed == (not spike) and int(metrics["skipped_in_a_row"]) == int(bool(spike))
        spikes += [i] if spike else []
        if sigma:
            assert int(metrics["spike"]) == int(spike)
            assert (float(metrics["loss"]) == float(state.window[-1])) == (not spike)
    assert (14 in spikes and len(spikes) < 4) == bool(sigma), spikes


def test_batches_left_out_by_hand():
    """Back from 12 to 7: batches 7 ... 11 are left out; then from 15 to 7 again, which has 12 ... 19."""
    none = LeftOut()
    assert [none.batch(s) for s in (0, 7, 30)] == [0, 7, 30]
    once = none.extended(7, 12)
    assert once.entries == [[7, 5]] and [once.batch(s) for s in (6, 7, 8)] == [6, 12, 13]
    twice = once.extended(7, 15)
    assert [twice.batch(s) for s in (6, 7, 8)] == [6, 20, 21]
    later = once.extended(10, 14)
    assert later.entries == [[7, 5], [10, 4]] and [later.batch(s) for s in (7, 9, 10)] == [12, 14, 19]
    assert later.extended(4, 11).entries == [[4, 16]], "what was left out after the new place is left out with the rest"


@pytest.mark.parametrize("seed", range(20))
def test_no_batch_is_seen_again_after_it_was_left_out(seed):
    """Play random rewinds: every batch up to the newest is either part of the run or between a target and its spike."""
    draw = random.Random(seed)
    out, done, gone = LeftOut(), [], set()
    for _ in range(4):
        for _ in range(draw.randint(1, 12)):
            done.append(out.batch(len(done)))
        target = draw.randint(0, len(done) - 1)
        out = out.extended(target, len(done))
        gone |= set(done[target:])
        done = done[:target]
    for _ in range(5):
        done.append(out.batch(len(done)))
    assert done == sorted(set(done)) and not gone & set(done)
    assert set(range(done[-1])) <= gone | set(done)
    reads = out.batches(lambda n: (k for k in itertools.count(n)), 0)
    assert list(itertools.islice(reads, len(done))) == done
    start = draw.randint(0, len(done) - 1)
    assert list(itertools.islice(out.batches(lambda n: (k for k in itertools.count(n)), start), 3)) == [
        out.batch(s) for s in range(start, start + 3)
    ]


def test_they_are_kept_in_the_run(tmp_path):
    workdir = Workdir(str(tmp_path / "run"))
    assert LeftOut.load(workdir).entries == []
    LeftOut().extended(7, 12).extended(3, 9).save(workdir)
    found = LeftOut.load(Workdir(str(tmp_path / "run")))
    assert (found.entries, found.rewinds) == ([[3, 11]], 2) and workdir.exists(LEFT_OUT)
