"""The step: accumulation, randomness, skipped updates, the average, donation, and that it learns.

Where the network does not matter a linear regression stands in for it: it compiles in a tenth of the time.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aether.explain.capacity import penalty
from aether.losses import lm
from aether.nn import YatNMN
from aether.testing import VOCAB, equations, tiny_batch, tiny_config
from aether.train.step import accumulate, init_state, make_step


class Line(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.ones((3, 2)), axes=("embed", "mlp"))
        self.bias = nnx.Param(jnp.zeros((2,)), axes=("mlp",))


class Words(nnx.Module):
    """As much of a language model as `lm` needs: an embedding and a head."""

    vocab = VOCAB

    def __init__(self):
        self.embed, self.head = (nnx.Param(jax.random.normal(jax.random.key(i), (VOCAB, 16))) for i in (0, 1))

    def __call__(self, tokens, **_):
        return self.embed[...][tokens], None

    def head_kernel(self):
        return self.head[...].T


def squares(model, batch, key):
    """The summed squared error of rows where the mask is 1, with noise from the key on the target."""
    noise = jax.random.normal(key, batch["y"].shape) * batch["noise"].max()
    error = jnp.sum((batch["x"] @ model.kernel[...] + model.bias[...] - batch["y"] - noise) ** 2, -1)
    total, weight = jnp.sum(batch["mask"] * error), jnp.sum(batch["mask"])
    return total, dict(nll=total, correct=weight, weight=weight)


class Units(nnx.Module):
    """A ⵟ layer for the regression."""

    def __init__(self):
        options = dict(epsilon=0.5, learnable_epsilon=True, softplus_bias=True, bias_init=0.3, alpha_init=0.7)
        self.layer = YatNMN(3, 2, **options, rngs=nnx.Rngs(0))


def squares_of_units(model, batch, key):
    error = jnp.sum((model.layer(batch["x"]) - batch["y"]) ** 2, -1)
    return jnp.sum(error), dict(nll=jnp.sum(error), correct=jnp.float32(0), weight=jnp.sum(batch["mask"]))


def units(**optim):
    config = tiny_config(optim=dict(warmup_steps=0, lr_scale={"kernel": 0.5}, clip=0.1, **optim))
    graph, params = nnx.split(Units())
    return graph, init_state(config, params), jax.jit(make_step(config, graph, squares_of_units, params))


def line(**train):
    """State and jitted step of the regression."""
    config = tiny_config(train=train, optim=dict(warmup_steps=0, lr_scale={"bias": 0.5}))
    graph, params = nnx.split(Line())
    return init_state(config, params), jax.jit(make_step(config, graph, squares, params), donate_argnums=0)


def rows(seed=0, noise=0.0):
    rng = np.random.default_rng(seed)
    batch = dict(x=rng.normal(size=(8, 3)), y=rng.normal(size=(8, 2)), mask=np.ones(8), noise=np.full(8, noise))
    return {k: v.astype(np.float32) for k, v in batch.items()}


def copies(tree):
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def equal(a, b):
    """Bit by bit, so that NaN equals NaN."""
    return all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


def test_accumulated_gradients_are_those_of_the_large_batch_with_ragged_masks_too():
    graph, params = nnx.split(Words())
    batch = tiny_batch(tiny_config())
    batch["mask"][2], batch["mask"][5, 1:] = 0, 0  # a row that counts nothing, and one that counts little
    assert len(set(batch["mask"].sum(1))) > 3

    def total(params, extras, batch, key):
        value, sums = lm(nnx.merge(graph, params), batch, None, chunk=4, z_loss=1e-2)
        return value, (sums, extras)

    none = nnx.State({})
    both = jax.jit(lambda p, b: [accumulate(total, p, none, b, jax.random.key(0), pieces)[:2] for pieces in (1, 4)])
    (whole, sums), (pieces, sums_of_pieces) = both(params, batch)
    assert sums["weight"] == sums_of_pieces["weight"] == batch["mask"].sum()
    assert float(sums["nll"]) == pytest.approx(float(sums_of_pieces["nll"]), rel=1e-6)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True):
        assert float(jnp.linalg.norm(a - b)) <= 2e-6 * float(jnp.linalg.norm(a))


def test_an_accumulated_step_is_the_step_of_the_large_batch():
    found, scans = [], []
    batch = rows()
    batch["mask"][[1, 2, 6]] = 0
    for pieces in (1, 4):
        state, step = line(accumulate=pieces)
        scans.append(
            [e.params["length"] for e in equations(step.trace(state, batch).jaxpr) if e.primitive.name == "scan"]
        )
        state, metrics = step(state, batch)
        found.append([*copies(state.params), *(np.float32(v) for _, v in sorted(metrics.items()))])
    assert scans == [[], [4]]
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_the_gradient_is_that_of_the_mean_over_scored_tokens():
    state, step = line()
    batch = rows()
    batch["mask"][:5] = 0
    error = (batch["x"] @ np.ones((3, 2)) - batch["y"])[5:]
    _, metrics = step(state, batch)
    assert float(metrics["loss"]) == pytest.approx((error**2).sum() / 3, rel=1e-5)
    slopes = [2 * batch["x"][5:].T @ error / 3, 2 * error.sum(0) / 3]
    assert float(metrics["grad_norm"]) == pytest.approx(np.sqrt(sum((g**2).sum() for g in slopes)), rel=1e-5)
    assert (float(metrics["tokens"]), float(metrics["accuracy"])) == (3, 1)


def test_randomness_is_a_function_of_seed_and_step():
    losses = {}
    for seed in (0, 1):
        state, step = line(seed=seed, accumulate=2)
        for start in (3, 4, 3):
            copy = jax.tree.map(jnp.copy, state)
            copy.step = jnp.asarray(start, jnp.int32)
            loss = float(step(copy, rows(noise=1.0))[1]["loss"])
            assert losses.setdefault((seed, start), loss) == loss
    assert len(set(losses.values())) == 4


def test_microbatches_have_randomness_of_their_own():

    def total(p, seen, batch, key):
        draw = jax.random.normal(key)
        return p * draw, (dict(first=draw, second=draw**2), seen + jnp.sum(batch["mask"]))

    _, sums, seen = accumulate(total, jnp.float32(1.0), jnp.float32(5.0), rows(), jax.random.key(0), 2)
    assert float(seen) == 5 + 8, "extras pass from one microbatch to the next"
    assert float(sums["second"] - sums["first"] ** 2 / 2) > 1e-3  # twice the variance of the two draws


@pytest.mark.parametrize("pieces", [1, 2])
def test_what_the_forward_pass_sets_goes_on_to_the_next_step_unless_it_is_skipped(pieces):

    class Counting(Line):
        def __init__(self):
            super().__init__()
            self.seen = nnx.BatchStat(jnp.ones(()))

    def loss(model, batch, key):
        model.seen[...] = 2.0 * model.seen[...] + jnp.sum(batch["mask"])
        return squares(model, batch, key)

    graph, params, extras = nnx.split(Counting(), nnx.Param, ...)
    config = tiny_config(train=dict(accumulate=pieces))
    state, step = init_state(config, params, extras), jax.jit(make_step(config, graph, loss, params))
    bad = rows()
    bad["x"][3, 1] = np.nan
    for batch, expected in ((rows(), [10, 16]), (bad, [10, 16]), (rows(1), [28, 76])):
        state, _ = step(state, batch)
        assert float(state.extras["seen"][...]) == expected[pieces - 1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e13], ids=["nan", "inf", "gradient overflows"])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counters(bad):
    state, step = line(ema=0.9)
    state, _ = step(state, rows())
    before = copies((state.params, state.opt_state, state.ema))
    for row in (1, 2):
        batch = rows(row)
        batch["x"][3, 1] = bad
        state, metrics = step(state, batch)
        assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (1 + row, row, row)
        assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (row, row)
        assert np.isfinite(float(metrics["loss"])) == (bad == 1e13)
        assert not np.isfinite(float(metrics["grad_norm"]))
        assert equal(before, copies((state.params, state.opt_state, state.ema)))
    state, metrics = step(state, rows(3))
    assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (4, 2, 0)
    after = copies((state.params, state.opt_state, state.ema))
    assert np.isfinite(float(metrics["loss"])) and all(np.isfinite(a).all() for a in after)
    assert not equal(before, after)


def test_the_average_follows_the_parameters():
    state, step = line(ema=0.75)
    average = copies(state.params)
    for i in range(3):
        state, _ = step(state, rows(i))
        average = [0.75 * a + 0.25 * p for a, p in zip(average, copies(state.params), strict=True)]
    for want, got in zip(average, copies(state.ema), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    assert not equal(copies(state.ema), copies(state.params))
    assert line()[0].ema is None


def test_learning_rates_are_scaled_by_path():
    """Adam's first move is the learning rate times the sign of the gradient; the kernel is decayed besides."""
    state, step = line()
    state, metrics = step(state, rows())
    rate = float(metrics["learning_rate"])
    np.testing.assert_allclose(np.abs(state.params["bias"][...]), 0.5 * rate, rtol=1e-4)
    np.testing.assert_allclose(np.abs(state.params["kernel"][...] - 1 + 0.1 * rate), rate, rtol=1e-3)


def test_a_batch_without_a_scored_token_is_no_disaster():
    state, step = line()
    batch = rows()
    batch["mask"][:] = 0
    state, metrics = step(state, batch)
    assert (float(metrics["loss"]), float(metrics["tokens"]), int(state.skipped)) == (0.0, 0.0, 0)


@pytest.mark.parametrize("kind", ["aether", "gpt2"])
def test_learns_a_batch_by_heart_in_donated_memory(trainer, kind):
    """Warnings are errors: a donated buffer that is not used would end the test."""
    config = tiny_config(kind)
    state, step = trainer(config)
    given = jax.tree.leaves(state)
    losses = []
    for _ in range(60):
        state, metrics = step(state, tiny_batch(config))
        losses.append(float(metrics["loss"]))
    assert all(x.is_deleted() for x in given)
    assert losses[0] == pytest.approx(np.log(32), rel=0.1)
    assert losses[-1] < 0.6 * losses[0] and float(metrics["accuracy"]) > 0.4
    assert float(metrics["learning_rate"]) == pytest.approx(1e-3)  # the cosine's end: a tenth


def test_muon_learns_too(trainer):
    config = tiny_config(optim=dict(name="muon"))
    state, step = trainer(config)
    losses = []
    for _ in range(10):
        state, metrics = step(state, tiny_batch(config))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.2 and int(state.skipped) == 0


def test_the_decay_of_norms_is_their_gradient_times_the_learning_rate():
    """By differences in the norms' formula; on top of a step whose gradient is clipped and scaled by Adam."""
    (_, state, plain), (_, _, decayed) = units(), units(rkhs_decay=0.2)
    (without, metrics), (with_it, same) = plain(state, rows()), decayed(state, rows())
    assert float(metrics["grad_norm"]) == float(same["grad_norm"]) > 0.1

    def mean(p):
        square, bias = np.sum(p["kernel"] ** 2, 0), np.log1p(np.exp(p["bias"]))
        return np.mean(p["alpha"] ** 2 * (square + bias) ** 2 / np.log1p(np.exp(p["epsilon_param"])))

    start, a, b = (
        {k: np.asarray(v[...], np.complex128) for k, v in s.params["layer"].items()} for s in (state, without, with_it)
    )
    rate = float(metrics["learning_rate"])
    for name, value in start.items():
        slope = np.zeros(value.shape)
        for at in np.ndindex(value.shape):
            moved = value.copy()
            moved[at] += 1e-30j
            slope[at] = mean(start | {name: moved}).imag / 1e-30
        want = -rate * (0.5 if name == "kernel" else 1.0) * 0.2 * slope
        assert np.abs(want).min() > 1e-5
        np.testing.assert_allclose((b[name] - a[name]).real, want, atol=2e-7, err_msg=name)


def test_training_with_the_decay_of_norms_lowers_them():
    found = []
    for optim in (dict(), dict(rkhs_decay=0.3)):
        graph, state, step = units(weight_decay=0.0, **optim)
        for k in range(30):
            state, _ = step(state, rows(k))
        found.append(float(penalty(nnx.merge(graph, state.params))))
    assert found[1] < 0.8 * found[0]
