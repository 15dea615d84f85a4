"""Attention whose weights are products of features: o_i = Σ_j φ(q_i)·φ(k_j) v_j / Σ_j φ(q_i)·φ(k_j), in linear time.

Causal sums go through the sequence in chunks: pairs within a chunk are multiplied out, earlier keys enter through
the state Σ φ(k)⊗[v, 1], whose size does not depend on the length. The gradients of such sums are sums of the same form,

    n_i = Σ_{j≤i} (q_i·k_j) v_j
    dq_i = Σ_{j≤i} (dn_i·v_j) k_j,  dk_j = Σ_{i≥j} (v_j·dn_i) q_i,  dv_j = Σ_{i≥j} (k_j·q_i) dn_i,

so that the backward pass keeps only the operands and no states. Linear attention: arXiv 2006.16236.

Axes: b batch, t query, s key, h heads, m features, k head width.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from aether.kernels.yat import product


class LinearState(NamedTuple):
    """What decoding keeps of the keys so far: Σ φ(k)⊗v (b, h, m, k), Σ φ(k) (b, h, m) and their number (b,)."""

    kv: Array
    k: Array
    number: Array


def init_state(batch: int, heads: int, features: int, width: int) -> LinearState:
    """Return the float32 state before any key."""
    shape = (batch, heads, features)
    return LinearState(jnp.zeros((*shape, width)), jnp.zeros(shape), jnp.zeros((batch,)))


def step(
    state: LinearState,
    phi_q: Array,
    phi_k: Array,
    v: Array,
    *,
    chunk: int = 128,
    mask: Array | None = None,
    floor: float = 0.0,
) -> tuple[Array, LinearState]:
    """Attend causally from positions that follow those of `state`: one when decoding, more for a prompt.

    Args:
      state: of the positions before.
      phi_q: (b, t, h, m).
      phi_k: (b, t, h, m).
      v: (b, t, h, k).
      chunk: as in `linear_attention`, as are the next two.
      mask: (b, t).
      floor: smallest mean weight.

    Returns:
      (b, t, h, k) in v's dtype, and the state with these positions in it.
    """
    _check(phi_q, phi_k, v, True, chunk, mask, None, floor)
    phi_k, values, admitted = _admit(phi_k, v, mask)
    before = jnp.concatenate([state.kv, state.k[..., None]], -1)
    sums = causal_sums(phi_q, phi_k, values, jnp.zeros(v.shape[:2], jnp.int32), chunk, False)
    sums += product("bthm,bhmk->bthk", phi_q.astype(jnp.float32), before)
    count = state.number[:, None] + jnp.cumsum(admitted, 1)
    after = before + _state(phi_k, values)
    y = divide(sums[..., :-1], sums[..., -1], count[..., None], floor).astype(v.dtype)
    return y, LinearState(after[..., :-1], after[..., -1], count[:, -1])


def stream(
    phi: Callable[[Array], Array],
    state: LinearState,
    q: Array,
    k: Array,
    v: Array,
    *,
    block: int = 1024,
    chunk: int = 128,
    mask: Array | None = None,
    floor: float = 0.0,
) -> tuple[Array, LinearState]:
    """Do `step` by blocks with φ inside, so that the features of no more than `block` positions exist at a time.

    Args:
      phi: maps (b, t, h, k) to (b, t, h, m); the backward pass computes it anew.
      state: of the positions before; `init_state` at the start.
      q: (b, t, h, k) unit vectors.
      k: (b, t, h, k) unit vectors.
      v: (b, t, h, width).
      block: positions at a time.
      chunk: as in `linear_attention`, as are the next two.
      mask: (b, t).
      floor: smallest mean weight.

    Returns:
      (b, t, h, width) in v's dtype, and the state with these positions in it.
    """
    if block < 1:
        raise ValueError(f"block is {block}; it must be at least 1.")
    if mask is not None and mask.shape != v.shape[:2]:
        raise ValueError(f"mask is {mask.shape}; it must be {v.shape[:2]}, (batch, keys).")
    b, t = v.shape[:2]
    if t <= block:
        return step(state, phi(q), phi(k), v, chunk=chunk, mask=mask, floor=floor)
    mask = jnp.ones((b, t), bool) if mask is None else mask

    @jax.checkpoint
    def one(state: LinearState, parts: tuple[Array, ...]) -> tuple[LinearState, Array]:
        q, k, v, mask = parts
        y, state = step(state, phi(q), phi(k), v, chunk=chunk, mask=mask, floor=floor)
        return state, y

    state, y = jax.lax.scan(one, state, tuple(_chunks(x, block) for x in (q, k, v, mask)))
    return jnp.moveaxis(y, 0, 1).reshape(b, -1, *v.shape[2:])[:, :t], state


def linear_attention(
    phi_q: Array,
    phi_k: Array,
    v: Array,
    *,
    causal: bool,
    chunk: int = 128,
    mask: Array | None = None,
    segments: Array | None = None,
    floor: float = 0.0,
) -> Array:
    """Return κ-normalised means of the values, in memory linear in the length forward and backward.

    Args:
      phi_q: (b, t, h, m).
      phi_k: (b, s, h, m).
      v: (b, s, h, k).
      causal: position i sees keys 0 … i; needs t = s.
      chunk: positions that are multiplied out at a time (causal, or with segments).
      mask: (b, s) booleans, False for keys that nobody sees.
      segments: (b, s) document of each position, each a contiguous run with an id of its own; attention stays within.
      floor: the smallest mean weight Σ/n over the n admitted keys that is divided by. Features of both signs can sum to
        little, 0 or less where κ does not: such a row is divided by floor·n, so that it shrinks instead of growing.

    Returns:
      (b, t, h, k) in v's dtype; zeros for a query without keys, or whose divisor is not positive.

    Raises:
      ValueError: shapes do not fit, or `chunk` or `floor` is out of range.
    """
    _check(phi_q, phi_k, v, causal, chunk, mask, segments, floor)
    phi_k, values, admitted = _admit(phi_k, v, mask)
    if not causal and segments is None:
        sums = product("bthm,bhmk->bthk", phi_q.astype(jnp.float32), _state(phi_k, values))
        count = jnp.sum(admitted, 1, keepdims=True)
    else:
        documents = jnp.zeros(v.shape[:2], jnp.int32) if segments is None else segments.astype(jnp.int32)
        sums = causal_sums(phi_q, phi_k, values, documents, chunk, False)
        count = _counts(admitted, documents)
        if not causal:
            sums += _flip(causal_sums(*map(_flip, (phi_q, phi_k, values, documents)), chunk, True))
            count += _flip(_counts(_flip(admitted), _flip(documents))) - admitted
    return divide(sums[..., :-1], sums[..., -1], count[..., None], floor).astype(v.dtype)


def divide(sums: Array, total: Array, count: Array, floor: float) -> Array:
    """Return sums/max(total, floor·count), or 0 where that divisor is not positive; `sums` has one more axis."""
    divisor = jnp.maximum(total, floor * count)
    fine = ~(divisor <= 0)  # what is not a number stays so
    return jnp.where(fine[..., None], sums / jnp.where(fine, divisor, 1.0)[..., None], 0.0)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def causal_sums(q: Array, k: Array, v: Array, segments: Array, chunk: int, strict: bool) -> Array:
    """Return n_i = Σ_j (q_i·k_j) v_j in float32 over j ≤ i (j < i if `strict`) with segments_j = segments_i.

    Args:
      q: (b, t, h, m).
      k: (b, t, h, m).
      v: (b, t, h, k).
      segments: (b, t) integers, equal ids in contiguous runs.
      chunk: positions multiplied out at a time.
      strict: leave out j = i.
    """
    b, t, h, _ = q.shape
    parts = tuple(_chunks(x, min(chunk, t)) for x in (q, k, v, segments))
    state = jnp.zeros((b, h, q.shape[-1], v.shape[-1]), jnp.float32)
    scan = jax.lax.scan(partial(_one_chunk, strict), (state, segments[:, 0]), parts)
    return jnp.moveaxis(scan[1], 0, 1).reshape(b, -1, h, v.shape[-1])[:, :t]


def _sums_forward(q, k, v, segments, chunk, strict):
    return causal_sums(q, k, v, segments, chunk, strict), (q, k, v, segments)


def _sums_backward(chunk, strict, operands, g):
    q, k, v, segments = operands
    back = [_flip(x) for x in (q, k, v, segments, g)]
    dq = causal_sums(g, v, k, segments, chunk, strict)
    dk = _flip(causal_sums(back[2], back[4], back[0], back[3], chunk, strict))
    dv = _flip(causal_sums(back[1], back[0], back[4], back[3], chunk, strict))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


causal_sums.defvjp(_sums_forward, _sums_backward)


def _one_chunk(strict, carry, parts):
    """Sum over the pairs of a chunk and over what the state holds, and add the chunk to the state."""
    state, last = carry
    q, k, v, segments = parts
    positions = jnp.arange(q.shape[1])
    earlier = positions[:, None] > positions if strict else positions[:, None] >= positions
    pairs = earlier & (segments[:, :, None] == segments[:, None, :])
    scores = product("bthm,bshm->bhts", q, k)
    scores = jnp.where(pairs[:, None], scores, 0.0)
    within = product("bhts,bshk->bthk", scores, v.astype(jnp.float32))
    before = product("bthm,bhmk->bthk", q.astype(jnp.float32), state)
    sums = within + jnp.where((segments == last[:, None])[..., None, None], before, 0.0)
    end = segments[:, -1]
    kept = jnp.where((segments == end[:, None])[..., None, None], k, 0)
    state = jnp.where((last == end)[:, None, None, None], state, 0.0)
    return (state + _state(kept, v), end), sums


def _state(k: Array, v: Array) -> Array:
    return product("bshm,bshk->bhmk", k, v)


def _admit(phi_k: Array, v: Array, mask: Array | None) -> tuple[Array, Array, Array]:
    """Return features and [v, 1] with zeros where the mask is False, and the mask."""
    values = jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)
    if mask is None:
        return phi_k, values, jnp.ones(v.shape[:2], bool)
    here = mask[..., None, None]
    return jnp.where(here, phi_k, 0), jnp.where(here, values, 0), mask


def _chunks(x: Array, chunk: int) -> Array:
    """Pad (b, t, ...) at its end by zeros and cut it to (t / chunk, b, chunk, ...)."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % chunk)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _flip(x: Array) -> Array:
    return jnp.flip(x, 1)


def _counts(admitted: Array, segments: Array) -> Array:
    """Return the admitted keys up to each position within its document, (b, t)."""
    seen = jnp.cumsum(admitted, 1)
    starts = jnp.concatenate([jnp.ones_like(admitted[:, :1], bool), segments[:, 1:] != segments[:, :-1]], 1)
    return seen - jax.lax.cummax(jnp.where(starts, seen - admitted, 0), axis=1)


def _check(phi_q, phi_k, v, causal, chunk, mask, segments, floor):
    if phi_q.ndim != 4 or phi_k.ndim != 4:
        raise ValueError(
            f"phi_q is {phi_q.shape} and phi_k {phi_k.shape}; they must be (batch, length, heads, features)."
        )
    b, t, h, m = phi_q.shape
    if phi_k.shape[0] != b or phi_k.shape[2:] != (h, m):
        raise ValueError(f"phi_q is {phi_q.shape} and phi_k {phi_k.shape}; they may differ in the length only.")
    if v.ndim != 4 or v.shape[:3] != phi_k.shape[:3]:
        raise ValueError(f"v is {v.shape} and phi_k {phi_k.shape}; v must be (*phi_k.shape[:3], width).")
    if (causal or segments is not None) and phi_k.shape[1] != t:
        raise ValueError(f"phi_q has length {t} and phi_k {phi_k.shape[1]}; causal sums and segments need equal ones.")
    for name, value in (("mask", mask), ("segments", segments)):
        if value is not None and value.shape != v.shape[:2]:
            raise ValueError(f"{name} is {value.shape}; it must be {v.shape[:2]}, (batch, keys).")
    if mask is not None and mask.dtype != bool:
        raise ValueError(f"mask is of dtype {mask.dtype}; it must be of booleans.")
    if segments is not None and not jnp.issubdtype(segments.dtype, jnp.integer):
        raise ValueError(f"segments is of dtype {segments.dtype}; it must be of integers.")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1.")
    if not 0 <= floor < float("inf"):
        raise ValueError(f"floor is {floor}; it must be finite and not negative.")
