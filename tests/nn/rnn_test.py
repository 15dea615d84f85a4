"""Recurrent ⵟ cells: one step against float64, `nnx.RNN` and `scan`, their starting values, and what they learn."""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from aether.nn.rnn import YatGRUCell, YatLSTMCell, YatSimpleCell, scan
from tools import reference

CELLS = (YatSimpleCell, YatGRUCell, YatLSTMCell)
GATES = {YatSimpleCell: 1, YatGRUCell: 3, YatLSTMCell: 4}


@cache  # to build one eagerly takes a second; no test changes one
def make(kind, d=4, h=6, **kwargs):
    return kind(d, h, **kwargs, rngs=nnx.Rngs(0))


def formula(kind, cell, spherical=False):
    """Return (carry parts…, x) -> the carry parts after one step, in float64."""

    def mapping(layer, spherical=False):
        unit = {k: np.asarray(v, np.float64) for k, v in layer.unit().items() if k != "nonnegative_bias"}
        return lambda v: reference.yat(v, np.asarray(layer.kernel[...]), spherical=spherical, **unit)

    maps = mapping(cell.dense_i, spherical), mapping(cell.dense_h)
    if kind is YatLSTMCell:
        return lambda c, h, x: np.stack(reference.lstm_cell(c, h, x, *maps))
    step = reference.simple_cell if kind is YatSimpleCell else reference.gru_cell
    return lambda h, x: step(h, x, *maps)[None]


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("kind", CELLS)
def test_one_step_and_its_gradients_are_the_formula(rng, kind, spherical):
    cell = make(kind, spherical=spherical)
    x = rng.normal(size=(3, 4)).astype(np.float32)
    states = [0.3 * rng.normal(size=(3, 6)).astype(np.float32) for _ in range(2 if kind is YatLSTMCell else 1)]
    g = rng.normal(size=(len(states), 3, 6))

    @jax.jit
    @jax.value_and_grad
    def run(args):
        *states, x = args
        carry, output = cell(tuple(states) if len(states) > 1 else states[0], x)
        parts = jnp.stack(carry if len(states) > 1 else [carry])
        return jnp.sum(parts * g) + 0.0 * jnp.sum(output)

    loss, grads = run([*states, x])
    step = formula(kind, cell, spherical)
    want = step(*states, x)
    assert abs(loss - np.sum(want * g)) <= 1e-5 * np.sum(np.abs(want * g))
    for got, (grad, size) in zip(grads, reference.gradient(step, [*states, x], g), strict=True):
        assert np.linalg.norm(got - grad) <= 2e-5 * np.linalg.norm(size)


@pytest.mark.parametrize("kind", CELLS)
def test_runs_under_rnn_and_scan_alike(rng, kind):
    cell = make(kind)
    xs = jnp.asarray(rng.normal(size=(3, 5, 4)), jnp.float32)
    lengths = jnp.array([5, 2, 3])

    graph, params = nnx.split(cell)

    @jax.jit
    def run(params, xs):
        cell = nnx.merge(graph, params)
        rnn = nnx.RNN(cell)
        plain = rnn(xs, return_carry=True)
        major = rnn(xs.swapaxes(0, 1), time_major=True)
        back = rnn(xs, reverse=True, keep_order=True, return_carry=True)
        short = rnn(xs, seq_lengths=lengths, return_carry=True)
        return plain, major, back, short, scan(cell, xs), scan(cell, xs, reverse=True)

    plain, major, back, short, forwards, backwards = run(params, xs)
    leaves = jax.tree.leaves
    for a, b in zip(leaves((plain, back)), leaves((forwards, backwards)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(major, plain[1].swapaxes(0, 1), rtol=1e-5, atol=1e-6)
    hidden = short[0][1] if kind is YatLSTMCell else short[0]
    np.testing.assert_allclose(hidden, plain[1][jnp.arange(3), lengths - 1], rtol=1e-5, atol=1e-6)
    assert not np.allclose(backwards[1], forwards[1], atol=1e-3)


def test_scan_goes_on_from_a_carry(rng):
    cell = make(YatLSTMCell)
    xs = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)

    @jax.jit
    def both(xs):
        carry, first = scan(cell, xs[:2])
        return scan(cell, xs), (scan(cell, xs[2:], carry), first)

    (carry, whole), ((last, second), first) = both(xs)
    np.testing.assert_allclose(whole, jnp.concatenate([first, second]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(carry[0], last[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", CELLS)
def test_starts_at_order_one_with_finite_gradients_over_200_steps(rng, kind):
    cell = make(kind, 4, 16)
    xs = rng.normal(size=(4, 200, 4)).astype(np.float32)
    graph, params = nnx.split(cell)

    @jax.jit
    def run(params, xs):
        def loss(params, xs):
            _, ys = scan(nnx.merge(graph, params), xs)
            return jnp.sum(ys[:, -1] ** 2), ys

        (_, ys), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, xs)
        cell = nnx.merge(graph, params)
        return grads, ys, cell.dense_i(xs), cell.dense_h(ys)

    grads, ys, of_x, of_h = run(params, xs)
    assert all(jnp.isfinite(g).all() and jnp.abs(g).max() < 30 for g in jax.tree.leaves(grads))
    assert all((g != 0).any() for g in jax.tree.leaves(grads))
    assert 0.03 < ys.std() < 0.6 and jnp.abs(ys).max() <= 1
    for gate in jnp.split(of_x + of_h, GATES[kind], -1):
        assert 0.5 < gate.mean() < 10 and 0.3 < jnp.median(gate)


@pytest.mark.parametrize("kind", CELLS)
def test_a_zero_state_answers_one_half(kind):
    cell = make(kind)
    got = jax.jit(lambda h: cell.dense_h(h))(jnp.zeros((1, 6)))
    np.testing.assert_allclose(got, 2.0 * (6 / 16) / (6 / 4 + 1.0), rtol=1e-5)  # α b² / (‖w‖² + ε): ½ for large h


@pytest.mark.parametrize("kind", [YatGRUCell, YatLSTMCell])
def test_learns_to_remember_the_first_token(kind):
    batch, length, tokens, steps = 16, 8, 4, 150
    optimiser = optax.adam(3e-2)
    cell = make(kind, 4, 16)
    graph, params = nnx.split((cell, nnx.Linear(16, tokens, rngs=nnx.Rngs(1))))

    def score(params, key):
        cell, head = nnx.merge(graph, params)
        ids = jax.random.randint(key, (batch, length), 0, tokens)
        logits = head(scan(cell, 2.0 * jax.nn.one_hot(ids, tokens))[1][:, -1])
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 0]).mean()
        return nats, (jnp.argmax(logits, -1) == ids[:, 0]).mean()

    @jax.jit
    def train(params):
        def step(carry, key):
            params, state = carry
            (nats, right), grads = jax.value_and_grad(score, has_aux=True)(params, key)
            updates, state = optimiser.update(grads, state)
            return (optax.apply_updates(params, updates), state), (nats, right)

        return jax.lax.scan(step, (params, optimiser.init(params)), jax.random.split(jax.random.key(0), steps))[1]

    nats, right = train(params)
    assert abs(nats[0] - math.log(tokens)) < 0.5  # it starts as a guess
    assert right[-20:].mean() > 0.95


@pytest.mark.parametrize("kind", CELLS)
def test_half_precision_carries_float32(rng, kind):
    xs = jnp.asarray(rng.normal(size=(2, 5, 4)), jnp.float32)
    cell, exact = make(kind, dtype="bfloat16"), make(kind)
    (carry, half), full = jax.jit(lambda xs: (scan(cell, xs), scan(exact, xs)[1]))(xs)
    assert half.dtype == "bfloat16" and all(leaf.dtype == "float32" for leaf in jax.tree.leaves(carry))
    assert np.linalg.norm(half - full) <= 0.03 * np.linalg.norm(full)


def test_parameters_and_options():
    shapes = {path: v[...].shape for path, v in nnx.to_flat_state(nnx.state(make(YatGRUCell)))}
    assert shapes == {
        ("dense_h", "bias"): (18,),
        ("dense_h", "kernel"): (6, 18),
        ("dense_i", "bias"): (18,),
        ("dense_i", "kernel"): (4, 18),
    }
    lstm = make(YatLSTMCell).dense_i.unit()
    np.testing.assert_allclose(lstm["bias"].reshape(4, 6) / 2.0, np.array([[1], [5], [1], [1]]) * np.ones((4, 6)), 1e-5)
    assert (lstm["alpha"], lstm["epsilon"], lstm["nonnegative_bias"]) == (0.5, 1.0, True)
    learned = make(YatLSTMCell, use_alpha=True, learnable_epsilon=True, epsilon=0.25, scalar_bias=True)
    assert learned.dense_h.unit()["alpha"] == 2.0 and learned.dense_i.bias[...].shape == (1,)
    np.testing.assert_allclose(learned.dense_i.unit()["epsilon"], 0.25, rtol=1e-5)
    fixed = make(YatGRUCell, constant_bias=1.0, constant_alpha=3.0).dense_h.unit()
    assert (fixed["bias"], fixed["alpha"]) == (1.0, 3.0)
    signed = make(YatGRUCell, softplus_bias=False).dense_h
    assert (signed.bias[...] == math.sqrt(6) / 4).all() and not signed.unit()["nonnegative_bias"]
    assert make(YatGRUCell, use_bias=False).dense_i.bias is None


def test_each_gate_of_the_state_starts_with_orthogonal_prototypes_of_its_own():
    kernel = np.asarray(make(YatGRUCell).dense_h.kernel[...])
    gates = np.split(kernel, 3, 1)
    for gate in gates:
        np.testing.assert_allclose(gate.T @ gate, 6 / 4 * np.eye(6), atol=1e-5)
    assert not np.allclose(gates[0], gates[1])


def test_the_first_state():
    c, h = make(YatLSTMCell).initialize_carry((2, 3, 4))
    assert c.shape == h.shape == (2, 3, 6) and not c.any() and not h.any()
    drawn = make(YatLSTMCell).initialize_carry((2, 4), nnx.Rngs(0), nnx.initializers.normal(1.0))
    assert drawn[0].std() > 0.3 and (drawn[0] != drawn[1]).all()
    with pytest.raises(ValueError, match="carry_init is given and rngs is None"):
        make(YatGRUCell).initialize_carry((2, 4), None, nnx.initializers.ones)


def test_bad_input_is_named():
    cell = make(YatGRUCell)
    with pytest.raises(ValueError, match=r"x is \(2, 5\) and in_features is 4"):
        cell(jnp.zeros((2, 6)), jnp.zeros((2, 5)))
    with pytest.raises(ValueError, match=r"carry is \(2, 5\) and the inputs ask for \(2, 6\)"):
        cell(jnp.zeros((2, 5)), jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"xs is \(4,\)"):
        scan(cell, jnp.zeros(4))
    with pytest.raises(ValueError, match="in_features and hidden_features are 4 and 0"):
        make(YatGRUCell, h=0)
    with pytest.raises(ValueError, match="epsilon is -1.0"):
        make(YatSimpleCell, epsilon=-1.0)
