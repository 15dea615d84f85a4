"""The structured mask: whole, block by block, and which blocks it leaves out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aether.kernels.masks import Mask

B, G, R, T, S = 2, 2, 2, 5, 8
SEGMENTS = dict(query_segments=[[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]], key_segments=np.arange(16).reshape(2, 8) // 3 % 3)
VALID = np.arange(16).reshape(2, 8) % 5 > 0
DENSE = np.random.default_rng(0).random((B, G * R, T, S)) < 0.5
CASES = dict(
    all=dict(),
    causal=dict(causal=True),
    after=dict(causal=True, offset=3),
    window=dict(window=2, offset=2),
    segments=SEGMENTS,
    valid=dict(valid=VALID),
    dense=dict(dense=DENSE),
    by_row=dict(dense=DENSE[:1, :1]),
    by_key=dict(dense=DENSE[:, :1, :1]),
    by_head=dict(dense=DENSE[0, :, :, :1]),
    together=dict(window=4, offset=3, valid=VALID, dense=DENSE[0, 0], **SEGMENTS),
)


def make(case):
    return Mask(**{k: jnp.asarray(v) if np.ndim(v) else v for k, v in case.items()})


def wanted(b, h, i, j, causal=False, window=None, offset=0, query_segments=None, key_segments=None, **arrays):
    """Say whether query i of head h sees key j, one pair at a time."""
    at = i + offset
    seen = (not causal and window is None) or j <= at
    seen = seen and (window is None or j > at - window)
    seen = seen and (query_segments is None or query_segments[b][i] == key_segments[b][j])
    seen = seen and ("valid" not in arrays or arrays["valid"][b, j])
    return seen and ("dense" not in arrays or np.broadcast_to(arrays["dense"], (B, G * R, T, S))[b, h, i, j])


@pytest.mark.parametrize("name", CASES)
def test_a_block_is_that_part_of_the_whole(name):
    mask = make(CASES[name]).checked(B, G, R, T, S)
    whole = np.array([wanted(*at, **CASES[name]) for at in np.ndindex(B, G * R, T, S)]).reshape(B, G, R, T, S)

    @jax.jit
    def parts(mask):
        def at(row, rows, column, columns):
            seen = mask.block(row, rows, column, columns)
            return jnp.broadcast_to(True if seen is None else seen, (B, G, R, rows, columns))

        padded = mask.padded(1, 4)
        blocks = [[padded.block(jnp.int32(i), 3, jnp.int32(j), 4) for j in (0, 4, 8)] for i in (0, 3)]
        joined = None
        if blocks[0][0] is not None:
            blocks = [[jnp.broadcast_to(x, (B, G, R, 3, 4)) for x in row] for row in blocks]
            joined = jnp.concatenate([jnp.concatenate(row, -1) for row in blocks], -2)[..., :T, :S]
        return at(0, T, 0, S), joined

    got, joined = parts(mask)
    np.testing.assert_array_equal(got, whole)
    if name != "all":
        np.testing.assert_array_equal(joined, whole)


@pytest.mark.parametrize("name", ["all", "causal", "after", "window"])
def test_the_span_is_just_the_blocks_with_something_in_them(name):
    mask, columns = make(CASES[name]), 2
    for row in range(0, T - 1, 2):
        seen = mask.block(row, 2, 0, S)
        seen = np.ones((2, S), bool) if seen is None else np.asarray(seen)[0, 0, 0]
        filled = np.flatnonzero(seen.reshape(2, -1, columns).any((0, 2)))
        first, last = mask.span(row, 2, columns, S // columns)
        assert (int(first), int(last)) == (filled[0], filled[-1] + 1)


BAD = [
    (dict(window=0), "window is 0; it must be an integer of at least 1"),
    (dict(query_segments=jnp.zeros((B, T))), "query_segments and key_segments go together"),
    (dict(query_segments=jnp.zeros((B, T)), key_segments=jnp.zeros((B, T))), r"key_segments is \(2, 5\).*\(2, 8\)"),
    (dict(valid=jnp.ones((B, T), bool)), r"valid is \(2, 5\); it must be \(2, 8\)"),
    (dict(valid=jnp.ones((B, S))), "valid is float32; it must be bool"),
    (dict(dense=jnp.ones((T, S), int)), "dense is int32; it must be bool"),
    (dict(dense=jnp.ones((3, T, S), bool)), r"mask is \(3, 5, 8\).*\(b, h, t, s\) = \(2, 4, 5, 8\)"),
    (dict(dense=jnp.ones((1, 1, 1, T, S), bool)), "it must broadcast"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Mask(**fields).checked(B, G, R, T, S)
