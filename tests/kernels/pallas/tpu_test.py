"""The TPU kernels, interpreted on a CPU: values by NumPy, and gradients by the formula, in float64."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aether.kernels.attention import DotScore, YatScore, plain
from aether.kernels.flash import flash
from aether.kernels.masks import Mask
from aether.kernels.normalization import Normalization
from aether.kernels.pallas import tpu
from aether.kernels.pallas.blocks import Blocks
from tools import reference as ref

B, G, R = 2, 2, 2
H = G * R
NAMES = ("q", "k", "v", "bias", "alpha", "epsilon", "constant")
rng0 = np.random.default_rng(5)


def segments(n):
    return np.sort(rng0.integers(0, 3, (B, n)), 1).astype(np.int32)


def block_of(rows, columns, held=0):
    return Blocks(rows, columns, held or columns, 2**20)


SOFTMAX, L1 = Normalization(), Normalization("l1", constant=np.linspace(0.1, 0.4, H).astype(np.float32))
SHORT = segments(50)
# (t, s), widths, blocks, mask, normalization, score
CASES = dict(
    dot=((50, 50), (16, 8), block_of(16, 8, 32), dict(causal=True), SOFTMAX, "dot"),
    all=((17, 40), (32, 32), block_of(8, 16, 48), dict(), SOFTMAX, "yat"),
    causal=((50, 50), (8, 16), block_of(16, 8, 56), dict(causal=True), SOFTMAX, "yat"),
    l1=((50, 50), (16, 16), block_of(8, 16, 32), dict(causal=True), L1, "yat"),
    window=((60, 60), (16, 16), block_of(16, 8, 24), dict(window=10), L1, "spherical"),
    narrow=((40, 40), (16, 16), block_of(8, 16), dict(window=2), SOFTMAX, "yat"),
    cache=((33, 75), (16, 24), block_of(32, 16, 64), dict(causal=True, offset=42), SOFTMAX, "spherical"),
    late=((20, 64), (16, 16), block_of(8, 8, 16), dict(window=12, offset=30), SOFTMAX, "yat"),
    segments=(
        (50, 50),
        (16, 16),
        block_of(16, 16, 32),
        dict(query_segments=SHORT, key_segments=SHORT),
        L1,
        "spherical",
    ),
    packed=(
        (50, 50),
        (16, 16),
        block_of(16, 8),
        dict(causal=True, query_segments=SHORT, key_segments=SHORT, valid=rng0.random((B, 50)) < 0.7),
        SOFTMAX,
        "yat",
    ),
    padding=((20, 50), (16, 16), block_of(128, 128), dict(valid=rng0.random((B, 50)) < 0.6), L1, "yat"),
    long=((200, 200), (8, 8), block_of(128, 128), dict(causal=True), SOFTMAX, "spherical"),
)


def make(case, dtype=np.float32):
    """Draw the seven inputs of a case, as they are after rounding to `dtype`."""
    (t, s), (width, values), *_, kind = CASES[case]
    rng = np.random.default_rng(len(case))
    q, k, v = (rng.normal(size=z) for z in ((B, G, R, t, width), (B, G, s, width), (B, G, s, values)))
    if kind == "spherical":
        q, k = ref.unit(q), ref.unit(k)
    bias, alpha, epsilon = 0.1 + 0.1 * np.arange(H), 3.0 - 0.5 * np.arange(H), 0.3 + 0.1 * np.arange(H)
    if case == "late":
        bias = bias - 0.4
    operands = [jnp.asarray(a, dtype) for a in (q, k, v)]
    constant = np.broadcast_to(CASES[case][4].constant, (H,))
    return operands + [jnp.asarray(a, jnp.float32) for a in (bias, alpha, epsilon, constant)]


def mask_of(case):
    told = {k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in CASES[case][3].items()}
    return Mask(**told)


def run(attend, case, q, k, v, bias, alpha, epsilon, constant, mask, **changes):
    score = YatScore(bias, alpha, epsilon, spherical=CASES[case][-1] == "spherical", **changes)
    score = DotScore() if CASES[case][-1] == "dot" else score
    n = replace(CASES[case][4], constant=constant)
    return attend(q, k, v, score, mask.checked(B, G, R, q.shape[-2], k.shape[-2]), n)


def interpreted(case, blocks=None):
    return partial(flash, platform="tpu", interpret=True, blocks=blocks or CASES[case][2])


def seen(case):
    """Return the booleans (b, 1, t, s) from the definition."""
    (t, s), *_ = CASES[case]
    told = dict(causal=False, window=None, offset=0, query_segments=None, key_segments=None, valid=None)
    told |= CASES[case][3]
    p, j = told["offset"] + np.arange(t)[:, None], np.arange(s)
    keep = np.ones((B, t, s), bool)
    if told["causal"] or told["window"]:
        keep &= j <= p
    if told["window"]:
        keep &= j > p - told["window"]
    if told["query_segments"] is not None:
        keep &= told["query_segments"][:, :, None] == told["key_segments"][:, None]
    if told["valid"] is not None:
        keep &= told["valid"][:, None]
    return keep[:, None]


def exact(case, q, k, v, bias, alpha, epsilon, constant):
    """Return the output by the reference, (b, g, r, t, width)."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    t, kind, n = q.shape[-2], CASES[case][-1], CASES[case][4]
    q, k, v = q.reshape(B, H, t, -1).swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2)
    if kind == "dot":
        scores = np.einsum("bthk,bshk->bhts", q, np.repeat(k, R, 2)) / np.sqrt(q.shape[-1])
        weights = ref.attention_weights(scores, seen(case))
        y = np.einsum("bhts,bshk->bthk", weights, np.repeat(v, R, 2))
    else:
        options = dict(bias=bias, alpha=alpha, epsilon=epsilon, spherical=kind == "spherical")
        constants = np.asarray(constant, np.float64).reshape(-1, 1, 1)
        y = ref.yat_attention(q, k, v, mask=seen(case), normalization=n.name, l1_epsilon=constants, **options)
    return y.swapaxes(1, 2).reshape(B, G, R, t, -1)


@pytest.mark.parametrize("case", CASES)
def test_values_and_the_gradients_of_all_seven_inputs(case):
    """Gradients against the formula in float64 by JAX; that is checked by complex steps elsewhere."""
    args, size = make(case), (B, G, R, CASES[case][0][0], CASES[case][1][1])
    g = np.random.default_rng(1).normal(size=size).astype(np.float32)

    @jax.jit
    def both(args, mask):
        def loss(*args):
            y = run(interpreted(case), case, *args, mask)
            return jnp.sum(g * y), y

        return jax.grad(loss, range(7), has_aux=True)(*args)

    found, y = both(args, mask_of(case))
    np.testing.assert_allclose(y, exact(case, *args), atol=1e-5)
    for name, mine, wanted in zip(NAMES, found, plain_gradients(case, args, g), strict=True):
        assert mine.shape == wanted.shape and mine.dtype == jnp.float32
        unused = CASES[case][-1] == "dot" and name in ("bias", "alpha", "epsilon")
        unused |= name == "constant" and CASES[case][4].name == "softmax"
        assert unused or np.linalg.norm(wanted) > 1e-3, name
        np.testing.assert_allclose(mine, wanted, atol=2e-5 * max(1.0, np.abs(wanted).max()), err_msg=name)


def plain_gradients(case, args, g):
    """Differentiate the formula in float64 with JAX, whose only float32 are the inputs."""
    keep, kind, n = jnp.asarray(seen(case)[:, :, None]), CASES[case][-1], CASES[case][4]

    def loss(q, k, v, bias, alpha, epsilon, constant):
        bias, alpha, epsilon, constant = (p.reshape(G, R, 1, 1) for p in (bias, alpha, epsilon, constant))
        dot = jnp.einsum("bgrtk,bgsk->bgrts", q, k)
        if kind == "dot":
            score = dot / np.sqrt(q.shape[-1])
        else:
            square = 2.0
            if kind == "yat":
                square = jnp.sum(q * q, -1)[..., None] + jnp.sum(k * k, -1)[:, :, None, None]
            score = alpha * (dot + bias) ** 2 / ((square - 2 * dot + epsilon) * np.sqrt(q.shape[-1]))
        w = jnp.where(keep, jnp.exp(score) if n.name == "softmax" else score, 0.0)
        total = jnp.sum(w, -1, keepdims=True) + (constant if n.name == "l1" else 0.0)
        w = w / jnp.where(total > 0, total, 1.0)
        return jnp.sum(g * jnp.einsum("bgrts,bgsk->bgrtk", w, v))

    with jax.enable_x64(True):
        g, *args = (jnp.asarray(np.asarray(a), jnp.float64) for a in (g, *args))
        return jax.jit(jax.grad(loss, range(7)))(*args)


@pytest.mark.parametrize("case", ["dot", "l1", "window"])
def test_bfloat16_is_as_near_as_the_plain_form_is(case):
    args, whole = make(case, jnp.bfloat16), [a.astype(jnp.float32) for a in make(case, jnp.bfloat16)]

    def loss(attend, *args):
        *args, mask = args
        y = run(attend, case, *args, mask)
        return jnp.sum(jnp.sin(3 * y.astype(jnp.float32))), y

    def both(attend, args):
        (_, y), grads = jax.jit(jax.value_and_grad(partial(loss, attend), range(7), has_aux=True))(*args, mask_of(case))
        return y, *grads

    right, near, found = both(plain, whole), both(plain, args), both(interpreted(case), args)
    assert found[0].dtype == found[1].dtype == jnp.bfloat16
    for name, a, b, c in zip(("y", *NAMES), right, near, found, strict=True):
        a, b, c = (np.asarray(x, np.float64) for x in (a, b, c))
        assert np.linalg.norm(c - a) <= 2 * np.linalg.norm(b - a) + 1e-3 * np.linalg.norm(a), name


def test_the_final_level():
    """Softmax: log₂ Σ eˢ, and 0 where nothing is seen; L1: ε₁ + Σ s."""
    for case in ("packed", "l1"):
        q, k, v, bias, alpha, epsilon, constant = args = make(case)
        mask = mask_of(case)
        if case == "packed":
            mask = replace(mask, query_segments=mask.query_segments.at[:, 7].set(9))
        of_head = replace(CASES[case][4], constant=constant).by_head(G, R)
        options = dict(interpret=True, blocks=CASES[case][2])
        score = YatScore(bias, alpha, epsilon)
        y, level = jax.jit(partial(tpu.forward, **options))(q, k, v, score, mask, of_head)
        keep = seen(case) & (np.arange(50) != 7)[:, None] if case == "packed" else seen(case)
        b, a, e = (np.asarray(p, np.float64).reshape(1, H, 1, 1) for p in args[3:6])
        q, k = np.asarray(q, np.float64).reshape(B, H, 50, -1), np.repeat(np.asarray(k, np.float64), R, 1)
        distance = np.sum((q[:, :, :, None] - k[:, :, None]) ** 2, -1)
        s = a * (np.einsum("bhtk,bhsk->bhts", q, k) + b) ** 2 / (distance + e) / 4
        if case == "l1":
            right = np.sum(np.where(keep, s, 0), -1) + np.asarray(constant)[:, None]
        else:
            total = np.sum(np.where(keep, np.exp(s), 0), -1)
            right = np.where(total > 0, np.log2(np.where(total > 0, total, 1)), 0)
            assert (right[:, :, 7] == 0).all() and (np.asarray(y)[..., 7, :] == 0).all()
        np.testing.assert_allclose(level[..., 0].reshape(B, H, 50), right, rtol=1e-5, atol=1e-5)


def test_a_query_that_sees_nothing_gives_no_gradient():
    case = "packed"
    q, *rest = make(case)
    mask = mask_of(case)
    mask = replace(mask, query_segments=mask.query_segments.at[:, 7].set(9), valid=mask.valid.at[:, 3].set(False))

    @jax.jit
    def both(args, mask):
        y, back = jax.vjp(lambda *a: run(interpreted(case), case, *a, mask), *args)
        return y, back(jnp.ones_like(y))

    y, (dq, dk, dv, *others) = both([q, *rest], mask)
    assert (np.asarray(y)[..., 7, :] == 0).all() and (np.asarray(dq)[..., 7, :] == 0).all()
    assert (np.asarray(dk)[:, :, 3] == 0).all() and (np.asarray(dv)[:, :, 3] == 0).all()
    assert all(np.isfinite(a).all() for a in (dq, dk, dv, *others)) and (np.asarray(dq) != 0).any()


def test_shared_numbers_and_equal_vectors():
    """b, α and ε that are one for all heads sum over them; a key equal to its query has a clamped distance."""
    case = "causal"
    q, k, v, *_ = make(case)
    q, k = (jnp.asarray(ref.unit(a), jnp.float32) for a in (q, k))
    k = k.at[:, :, 5].set(q[:, :, 0, 9])

    def loss(attend, q, k, v, *numbers):
        score = YatScore(*numbers, spherical=True)
        y = attend(q, k, v, score, Mask(causal=True), CASES[case][4].by_head(G, R))
        return jnp.sum(jnp.sin(3 * y))

    numbers = jnp.float32(0.2), jnp.full((1,), 0.5), jnp.float32(0.1)
    found, right = (
        jax.jit(jax.grad(partial(loss, attend), range(6)))(q, k, v, *numbers) for attend in (interpreted(case), plain)
    )
    for mine, wanted in zip(found, right, strict=True):
        assert mine.shape == wanted.shape and np.linalg.norm(wanted) > 1e-3
        np.testing.assert_allclose(mine, wanted, rtol=1e-4, atol=2e-5 * np.abs(wanted).max())


def test_negative_scores_count_for_nothing_in_l1():
    case = "l1"
    q, k, v, bias, alpha, *rest = make(case)

    @jax.jit
    def both(alpha, mask):
        y, back = jax.vjp(lambda *a: run(interpreted(case), case, *a, mask), q, k, v, bias, alpha, *rest)
        return y, back(jnp.sin(3 * y) + 1)

    y, grads = both(alpha, mask_of(case))
    below, of_below = both(alpha.at[1].set(-1.0), mask_of(case))
    assert (np.asarray(below)[:, 0, 1] == 0).all() and (np.asarray(of_below[0])[:, 0, 1] == 0).all()
    assert all(float(g[1]) == 0 for g in of_below[3:6]) and all(np.isfinite(g).all() for g in of_below)
    np.testing.assert_array_equal(below[:, 1], y[:, 1])
    np.testing.assert_array_equal(of_below[1][:, 1], grads[1][:, 1])


def test_the_offset_may_be_traced():
    case = "cache"
    args = make(case)
    y = jax.jit(lambda offset: run(interpreted(case), case, *args, Mask(causal=True, offset=offset)))(jnp.int32(42))
    np.testing.assert_allclose(y, exact(case, *args), atol=1e-5)


def test_what_it_does_not_do_is_named():
    q, k, v, *_ = make("all")
    assert tpu.unsupported(q, k, v) == ""
    assert tpu.unsupported(*(a.astype(jnp.float16) for a in (q, k, v))) == "dtype float16"
    assert tpu.unsupported(q[..., :12], k[..., :12], v).startswith("heads of width 12")
    assert tpu.unsupported(q, k, jnp.zeros((B, G, 40, 264))).startswith("heads of width 264")


def test_extreme_scores_stay_finite():
    """Vectors of 1e5, whose scores make weights vanish, and of 1e-6: outputs and gradients are finite, and right.

    The short ones have scores of about 600, of which float32 rounds off 3e-5: as much of a weight, on either side.
    """
    case = "causal"
    q, k, v, *_ = make(case)
    scales = np.array([1e5, 1e-6], np.float32)[:, None, None, None]
    q, k, numbers = q * scales[..., None], k * scales, (jnp.float32(0.05), jnp.float32(1.0), jnp.float32(1e-6))

    @jax.jit
    def run_all(q, k, v):
        def one(attend, n):
            attend = partial(attend, score=YatScore(*numbers), mask=Mask(), normalization=n.by_head(G, R))
            y, back = jax.vjp(attend, q, k, v)
            return y, back(y)

        return [[one(attend, n) for n in (SOFTMAX, Normalization("l1"))] for attend in (interpreted(case), plain)]

    for (y, grads), (right, wanted) in zip(*run_all(q, k, v), strict=True):
        assert all(np.isfinite(a).all() for a in (y, *grads, right))
        np.testing.assert_allclose(y, right, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(grads[2], wanted[2], rtol=1e-3, atol=1e-4)
