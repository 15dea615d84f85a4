"""Losses: (model, batch, key) -> (total over the tokens, sums for the log). Vary the loss, never the loop.

Axes: b batch, t position, d width, v vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from aether.parallel import over_batch

Sums = dict[str, Array]
Loss = Callable[..., tuple[Array, Sums]]


def lm(
    model: Any, batch: dict[str, Array], key: Array | None, *, chunk: int = 128, z_loss: float = 0.0
) -> tuple[Array, Sums]:
    """Return the next-token loss summed over the scored tokens, Σ (−log p + z_loss · log² Z), and sums.

    Args:
      model: an `aether.models.GPT`, or what has its call, `head_kernel` and `vocab`.
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
    mask = batch["mask"].astype(jnp.float32)
    targets = batch["tokens"][:, 1:]
    with jax.named_scope("head"):
        kernel = model.head_kernel().astype(hidden.dtype)
        total, nll, correct = cross_entropy(chunk, z_loss, model.vocab, hidden, kernel, targets, mask)
    return total, dict(nll=nll, correct=correct, weight=jnp.sum(mask))


LOSSES: dict[str, Loss] = {"lm": lm}


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def cross_entropy(
    chunk: int, z_loss: float, vocab: int, hidden: Array, kernel: Array, targets: Array, mask: Array
) -> tuple[Array, Array, Array]:
    """Return Σ mask (−log p[target] + z_loss log² Z), the part without z_loss, and the sum of right guesses.

    The logits of `chunk` positions exist at a time, in float32; the gradient is formed with them in the same pass, so
    that nothing is computed twice. Only the first result has a gradient. On a mesh each device goes through its own
    rows and positions; the kernel is gathered once, and its gradient summed once.

    Args:
      chunk: positions of each sequence in one piece.
      z_loss: weight of log² Z.
      vocab: columns of the kernel that are ids; those behind pad it and have probability 0.
      hidden: (b, t, d).
      kernel: (d, v), of the same dtype, v ≥ vocab.
      targets: (b, t) ids below vocab.
      mask: (b, t) float32 weights.
    """
    return _sums(chunk, z_loss, vocab, False, hidden, kernel, targets, mask)[0]


def _sums(chunk: int, z_loss: float, vocab: int, grad: bool, hidden: Array, kernel: Array, targets: Array, mask: Array):
    """Return the sums, and with `grad` the gradients of the first by hidden and kernel."""
    scan = partial(_scan, chunk, z_loss, vocab, grad)
    return over_batch(scan, kernel, hidden, targets, mask)


def _scan(
    chunk: int, z_loss: float, vocab: int, grad: bool, kernel: Array, hidden: Array, targets: Array, mask: Array
) -> tuple:
    b, t, d = hidden.shape
    pieces = -(-t // chunk)
    chunk = -(-t // pieces)
    ids = jnp.arange(kernel.shape[1])

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, pieces * chunk - t)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(b, pieces, chunk, *x.shape[2:]), 1, 0)

    def piece(carry: tuple, xs: tuple[Array, Array, Array]) -> tuple[tuple, Array | None]:
        (total, nll, correct), d_kernel = carry
        h, target, weight = xs
        logits = jnp.matmul(h, kernel, preferred_element_type=jnp.float32)
        logits = jnp.where(ids < vocab, logits, -jnp.inf)
        hot = ids == target[..., None]
        # Sums and maxima, as these stay where the vocabulary is split; a look-up or argmax would gather the logits. All
        # sums go over the same logits, so that they are one pass.
        highest = jnp.max(logits, -1)
        log_z = highest + jnp.log(jnp.sum(jnp.exp(logits - highest[..., None]), -1))
        right = jnp.sum(jnp.where(hot, logits, 0.0), -1)
        before = jnp.sum(jnp.where((logits == highest[..., None]) & (ids < target[..., None]), 1.0, 0.0), -1)
        guessed = (right == highest) & (before == 0)  # of equal guesses the first counts
        loss = jnp.sum(weight * (log_z - right))
        sums = (
            total + loss + z_loss * jnp.sum(weight * log_z**2),
            nll + loss,
            correct + jnp.sum(weight * guessed),
        )
        if not grad:
            return (sums, None), None
        p = jnp.exp(logits - log_z[..., None]) * (1.0 + 2.0 * z_loss * log_z)[..., None]
        d_logits = (weight[..., None] * (p - hot)).astype(h.dtype)
        d_kernel += jnp.einsum("bcd,bcv->dv", h, d_logits, preferred_element_type=jnp.float32)
        return (sums, d_kernel), jnp.matmul(d_logits, kernel.T)

    zero = jnp.float32(0)
    start = ((zero, zero, zero), jnp.zeros(kernel.shape, jnp.float32) if grad else None)
    (sums, d_kernel), d_hidden = jax.lax.scan(piece, start, (cut(hidden), cut(targets), cut(mask)))
    if d_hidden is not None:
        d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(b, -1, d)[:, :t]
    return sums, d_hidden, d_kernel


def _forward(chunk, z_loss, vocab, hidden, kernel, targets, mask):
    sums, d_hidden, d_kernel = _sums(chunk, z_loss, vocab, True, hidden, kernel, targets, mask)
    return sums, (d_hidden, d_kernel.astype(kernel.dtype))


def _backward(chunk, z_loss, vocab, residuals, g):
    d_hidden, d_kernel = residuals
    scale = g[0]
    return (d_hidden * scale).astype(d_hidden.dtype), (d_kernel * scale).astype(d_kernel.dtype), None, None


cross_entropy.defvjp(_forward, _backward)
