"""Losses: (model, batch, key) -> (total over the tokens, sums for the log). Vary the loss, never the loop.

Axes: b batch, t position, d width, v vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Sums = dict[str, Array]
Loss = Callable[..., tuple[Array, Sums]]


def lm(
    model: Any, batch: dict[str, Array], key: Array | None, *, chunk: int = 128, z_loss: float = 0.0
) -> tuple[Array, Sums]:
    """Return the next-token loss summed over the scored tokens, Σ (−log p + z_loss · log² Z), and sums.

    Args:
      model: an `aether.models.GPT`.
      batch: `tokens`, `segments`, `positions` (b, t + 1), read as t inputs and t targets, and `mask` (b, t): 1 where
        the target counts.
      key: of dropout, or None.
      chunk: positions whose logits exist at one time.
      z_loss: weight of log² Z (Chowdhery et al., 2022).

    Returns:
      the total, to be divided by `sums["weight"]`, and the sums `nll`, `correct`, `weight`.
    """
    inputs = {k: batch[k][:, :-1] for k in ("tokens", "segments", "positions")}
    hidden, _ = model(inputs["tokens"], segments=inputs["segments"], positions=inputs["positions"], key=key)
    kernel = model.head_kernel().astype(hidden.dtype)
    mask = batch["mask"].astype(jnp.float32)
    total, nll, correct = cross_entropy(chunk, z_loss, hidden, kernel, batch["tokens"][:, 1:], mask)
    return total, dict(nll=nll, correct=correct, weight=jnp.sum(mask))


LOSSES: dict[str, Loss] = {"lm": lm}


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def cross_entropy(
    chunk: int, z_loss: float, hidden: Array, kernel: Array, targets: Array, mask: Array
) -> tuple[Array, Array, Array]:
    """Return Σ mask (−log p[target] + z_loss log² Z), the part without z_loss, and the sum of right guesses.

    The logits of `chunk` positions exist at a time, in float32; the gradient is formed with them in the same pass, so
    that nothing is computed twice. Only the first result has a gradient.

    Args:
      chunk: positions of each sequence in one piece.
      z_loss: weight of log² Z.
      hidden: (b, t, d).
      kernel: (d, v), of the same dtype.
      targets: (b, t) ids below v.
      mask: (b, t) float32 weights.
    """
    return _scan(chunk, z_loss, False, hidden, kernel, targets, mask)[0]


def _scan(chunk: int, z_loss: float, grad: bool, hidden: Array, kernel: Array, targets: Array, mask: Array):
    b, t, d = hidden.shape
    pieces = -(-t // chunk)
    chunk = -(-t // pieces)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, pieces * chunk - t)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(b, pieces, chunk, *x.shape[2:]), 1, 0)

    def piece(carry: tuple, xs: tuple[Array, Array, Array]) -> tuple[tuple, Array | None]:
        (total, nll, correct), d_kernel = carry
        h, target, weight = xs
        logits = jnp.matmul(h, kernel, preferred_element_type=jnp.float32)
        log_z = jax.nn.logsumexp(logits, -1)
        right = jnp.take_along_axis(logits, target[..., None], -1)[..., 0]
        loss = jnp.sum(weight * (log_z - right))
        sums = (
            total + loss + z_loss * jnp.sum(weight * log_z**2),
            nll + loss,
            correct + jnp.sum(weight * (jnp.argmax(logits, -1) == target)),
        )
        if not grad:
            return (sums, None), None
        p = jnp.exp(logits - log_z[..., None]) * (1.0 + 2.0 * z_loss * log_z)[..., None]
        hot = jnp.arange(logits.shape[-1]) == target[..., None]
        d_logits = (weight[..., None] * (p - hot)).astype(h.dtype)
        d_kernel += jnp.einsum("bcd,bcv->dv", h, d_logits, preferred_element_type=jnp.float32)
        return (sums, d_kernel), jnp.matmul(d_logits, kernel.T)

    zero = jnp.float32(0)
    start = ((zero, zero, zero), jnp.zeros(kernel.shape, jnp.float32) if grad else None)
    (sums, d_kernel), d_hidden = jax.lax.scan(piece, start, (cut(hidden), cut(targets), cut(mask)))
    if d_hidden is not None:
        d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(b, -1, d)[:, :t]
    return sums, d_hidden, d_kernel


def _forward(chunk, z_loss, hidden, kernel, targets, mask):
    sums, d_hidden, d_kernel = _scan(chunk, z_loss, True, hidden, kernel, targets, mask)
    return sums, (d_hidden, d_kernel.astype(kernel.dtype))


def _backward(chunk, z_loss, residuals, g):
    d_hidden, d_kernel = residuals
    scale = g[0]
    return (d_hidden * scale).astype(d_hidden.dtype), (d_kernel * scale).astype(d_kernel.dtype), None, None


cross_entropy.defvjp(_forward, _backward)
