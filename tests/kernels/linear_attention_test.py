from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aether.kernels.linear_attention import init_state, linear_attention, step, stream
from aether.testing import equations

BATCH, LENGTH, HEADS, FEATURES, WIDTH = 2, 23, 2, 5, 3
MASK = np.ones((BATCH, LENGTH), bool)
MASK[0, :4] = MASK[1, 9:12] = False
SEGMENTS = np.stack([np.repeat([1, 2, 3], [3, 13, 7]), np.repeat([7, 4, 9, 2], [8, 1, 8, 6])])
CASES = [
    dict(causal=True, mask=None, segments=None),
    dict(causal=True, mask=MASK, segments=SEGMENTS),
    dict(causal=False, mask=MASK, segments=None),
    dict(causal=False, mask=MASK, segments=SEGMENTS),
]


@pytest.fixture
def operands(rng):
    positive = np.abs(rng.normal(size=(2, BATCH, LENGTH, HEADS, FEATURES))) + 0.1
    v = rng.normal(size=(BATCH, LENGTH, HEADS, WIDTH))
    return tuple(jnp.asarray(x, jnp.float32) for x in (positive[0], positive[1], v))


def allowed(causal, mask, segments, xp=np):
    pairs = xp.ones((BATCH, LENGTH, LENGTH), bool)
    pairs = pairs & (np.tril(np.ones((LENGTH, LENGTH), bool)) if causal else True)
    pairs = pairs & (True if mask is None else mask[:, None])
    return pairs & (True if segments is None else segments[:, :, None] == segments[:, None])


def quadratic(q, k, v, causal, mask, segments, floor=0.0, xp=np):
    """All pairs at once."""
    pairs = allowed(causal, mask, segments)
    weights = xp.einsum("bthm,bshm->bhts", q, k) * pairs[:, None]
    divisor = xp.maximum(weights.sum(-1), floor * pairs.sum(-1)[:, None])
    fine = divisor > 0
    sums = xp.einsum("bhts,bshk->bthk", weights, v)
    return xp.where(fine, 1 / xp.where(fine, divisor, 1), 0).swapaxes(1, 2)[..., None] * sums


def test_chunks_equal_all_pairs_in_value_and_gradient(operands, rng):
    cotangent = jnp.asarray(rng.normal(size=operands[2].shape), jnp.float32)

    @jax.jit
    def ours(*operands):
        out = []
        for i, case in enumerate(CASES):
            y, back = jax.vjp(lambda *o, c=case, i=i: linear_attention(*o, chunk=(5, 7, 64)[i % 3], **c), *operands)
            out.append((y, back(cotangent)))
        return out

    @jax.jit
    def plain(*operands):
        return [jax.vjp(lambda *o, c=case: quadratic(*o, **c, xp=jnp), *operands)[1](cotangent) for case in CASES]

    exact = [np.asarray(x, np.float64) for x in operands]
    for case, (y, gradients), references in zip(CASES, ours(*operands), plain(*operands), strict=True):
        np.testing.assert_allclose(y, quadratic(*exact, **case), atol=1e-5, err_msg=str(case))
        for gradient, reference in zip(gradients, references, strict=True):
            np.testing.assert_allclose(gradient, reference, atol=1e-5, err_msg=str(case))


def test_rows_without_keys_are_zero_and_masked_values_do_not_matter(operands):
    q, k, v = operands
    bad = jnp.where(MASK[..., None, None], v, jnp.nan)
    y = jax.jit(lambda v: linear_attention(q, k, v, causal=True, chunk=5, mask=jnp.asarray(MASK)))(bad)
    assert np.all(np.asarray(y)[0, :4] == 0) and np.isfinite(y).all()
    assert np.all(np.abs(y)[0, 4:] > 0)


def test_causal_and_segments_by_gradient(operands):
    q, k, v = operands
    document = jnp.asarray(SEGMENTS)

    @jax.jit
    def reach(k, v):
        def one(i):
            def run(k, v):
                return jnp.sum(jnp.sin(linear_attention(q, k, v, causal=True, chunk=4, segments=document)[:, i]))

            return [jnp.abs(g).max((2, 3)) for g in jax.grad(run, (0, 1))(k, v)]

        return jax.lax.map(one, jnp.arange(LENGTH))

    pairs = allowed(True, None, SEGMENTS).swapaxes(0, 1)
    of_k, of_v = (np.asarray(g) for g in reach(k, v))
    assert np.array_equal(of_v > 0, pairs)
    assert np.all(of_k[~pairs] == 0)


def test_signed_features_are_kept_from_dividing_by_little(operands):
    q, k, v = operands
    q = q * jnp.asarray([1.0, -1.0])[None, None, :, None]  # the second head's sums are negative
    for floor in (0.0, 0.5, 3.0):
        y = jax.jit(partial(linear_attention, causal=False), static_argnames="floor")(q, k, v, floor=floor)
        np.testing.assert_allclose(y, quadratic(*map(np.asarray, (q, k, v)), False, None, None, floor), atol=1e-5)
        assert bool(jnp.all(y[:, :, 1] == 0)) == (floor == 0)


def test_decoding_equals_the_full_pass(operands):
    q, k, v = operands
    mask = jnp.asarray(MASK)
    full = jax.jit(lambda: linear_attention(q, k, v, causal=True, chunk=7, mask=mask, floor=1.2))()

    @jax.jit
    def decode():
        prompt = slice(0, 6)
        state = init_state(BATCH, HEADS, FEATURES, WIDTH)
        first, state = step(state, q[:, prompt], k[:, prompt], v[:, prompt], chunk=4, mask=mask[:, prompt], floor=1.2)

        def one(state, i):
            at = partial(jax.lax.dynamic_slice_in_dim, start_index=i, slice_size=1, axis=1)
            y, state = step(state, at(q), at(k), at(v), mask=at(mask), floor=1.2)
            return state, y[:, 0]

        state, rest = jax.lax.scan(one, state, jnp.arange(6, LENGTH))
        return jnp.concatenate([first, rest.swapaxes(0, 1)], 1), state

    y, state = decode()
    np.testing.assert_allclose(y, full, atol=1e-5)
    np.testing.assert_array_equal(state.number, MASK.sum(1))
    assert state.kv.shape == (BATCH, HEADS, FEATURES, WIDTH) and state.k.shape == (BATCH, HEADS, FEATURES)


def test_memory_is_linear_in_the_length_and_the_state_independent_of_it():
    chunk, m, width = 16, 24, 12

    def largest(t):
        shapes = [jax.ShapeDtypeStruct((1, t, 1, n), jnp.float32) for n in (m, m, width)]

        def run(*operands):
            return jnp.sum(linear_attention(*operands, causal=True, chunk=chunk) ** 2)

        jaxpr = jax.make_jaxpr(jax.grad(run, (0, 1, 2)))(*shapes).jaxpr
        return max(v.aval.size for e in equations(jaxpr) for v in e.outvars if hasattr(v.aval, "size"))

    assert largest(256) == 256 * m
    assert largest(2048) == 2048 * m  # not length × m × width / chunk either, which the states would be


def test_stream_has_features_of_one_block_at_a_time():
    block, m, width, t = 32, 40, 6, 256

    def run(w, q, k, v):
        state = init_state(1, 1, m, width)
        return jnp.sum(stream(lambda x: jnp.exp(x @ w), state, q, k, v, block=block, chunk=8)[0] ** 2)

    shapes = [jax.ShapeDtypeStruct((1, t, 1, width), jnp.float32)] * 3
    jaxpr = jax.make_jaxpr(jax.grad(run, (0, 1, 2, 3)))(jax.ShapeDtypeStruct((width, m), jnp.float32), *shapes).jaxpr
    sizes = [v.aval.size for e in equations(jaxpr) for v in e.outvars if hasattr(v.aval, "size")]
    assert max(sizes) == t // block * m * width  # the states between the blocks; the features of all are t·m


def test_stream_equals_the_whole_in_value_and_gradient(operands):
    q, k, v = operands
    mask = jnp.asarray(MASK)

    @jax.jit
    def both(w, q, k, v):
        def streamed(w, q, k, v):
            state = init_state(BATCH, HEADS, FEATURES, WIDTH)
            return stream(lambda x: jnp.exp(x @ w), state, q, k, v, block=8, chunk=4, mask=mask)[0]

        def whole(w, q, k, v):
            return linear_attention(jnp.exp(q @ w), jnp.exp(k @ w), v, causal=True, mask=mask)

        return [jax.vjp(f, w, q, k, v)[1](jnp.cos(v)) + (f(w, q, k, v),) for f in (streamed, whole)]

    for ours, expected in zip(*both(jnp.eye(FEATURES) / 4, q, k, v), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_bfloat16_keeps_float32_sums(operands):
    q, k, v = (x.astype(jnp.bfloat16) for x in operands)

    @jax.jit
    def ours(*operands):
        y, back = jax.vjp(lambda *o: linear_attention(*o, causal=True, chunk=8), *operands)
        return y, back(y)

    y, gradients = ours(q, k, v)
    exact = quadratic(*(np.asarray(x, np.float64) for x in (q, k, v)), True, None, None)
    assert y.dtype == jnp.bfloat16 and all(g.dtype == jnp.bfloat16 for g in gradients)
    assert np.linalg.norm(np.asarray(y, np.float64) - exact) < 4e-3 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(phi_k=jnp.ones((2, 4, 1, 6))), "phi_k"),
        (dict(v=jnp.ones((2, 5, 1, 3))), r"v is \(2, 5, 1, 3\)"),
        (dict(phi_q=jnp.ones((2, 3, 1, 5))), "phi_q has length 3 and phi_k 4"),
        (dict(phi_q=jnp.ones((2, 4, 5))), r"phi_q is \(2, 4, 5\)"),
        (dict(mask=jnp.ones((2, 3), bool)), r"mask is \(2, 3\); it must be \(2, 4\)"),
        (dict(mask=jnp.ones((2, 4))), "mask is of dtype float32"),
        (dict(segments=jnp.ones((4,), int)), r"segments is \(4,\)"),
        (dict(segments=jnp.ones((2, 4))), "segments is of dtype float32"),
        (dict(chunk=0), "chunk is 0"),
        (dict(floor=-1.0), "floor is -1.0"),
    ],
)
def test_bad_input_is_named(change, words):
    shapes = dict(phi_q=(2, 4, 1, 5), phi_k=(2, 4, 1, 5), v=(2, 4, 1, 3))
    arguments = {name: jnp.ones(shape) for name, shape in shapes.items()} | dict(causal=True) | change
    with pytest.raises(ValueError, match=words):
        linear_attention(**arguments)
