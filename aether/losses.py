"""Losses: (model, batch, key) -> (total over the tokens, sums for the log). Vary the loss, never the loop.

Axes: b batch, t position, d width, v vocabulary; h, w, c of images.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from aether.config import Config
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


def mlm(
    model: Any, batch: dict[str, Array], key: Array | None, *, chunk: int = 128, z_loss: float = 0.0
) -> tuple[Array, Sums]:
    """Return the loss of the ids that were masked, summed over them; as `lm` otherwise.

    Args:
      model: an `aether.models.Bert`.
      batch: `tokens` as the model sees them, `targets` as they were, `segments`, `positions`, and `mask`, 1 where the
        target counts; all (b, t).
      key: of dropout, or None.
      chunk: positions whose logits exist at one time.
      z_loss: weight of log² Z.
    """
    hidden = model(batch["tokens"], segments=batch["segments"], positions=batch["positions"], key=key)
    mask = batch["mask"].astype(jnp.float32)
    with jax.named_scope("head"):
        kernel = model.head_kernel().astype(hidden.dtype)
        total, nll, correct = cross_entropy(chunk, z_loss, model.vocab, hidden, kernel, batch["targets"], mask)
    return total, dict(nll=nll, correct=correct, weight=jnp.sum(mask))


def classify(
    model: Any,
    batch: dict[str, Array],
    key: Array | None,
    *,
    mean: float,
    std: float,
    label_smoothing: float = 0.0,
    mixup: float = 0.0,
    cutmix: float = 0.0,
) -> tuple[Array, Sums]:
    """Return the cross entropy of images summed over them, Σ −Σ_c t_c log p_c, and sums.

    In training (with a key) each image is mixed with the one before it in the batch: blended (Zhang et al., 2018), or a
    rectangle of that one pasted into it (Yun et al., 2019), half of the batches each where both are asked for; the
    targets t are mixed alike.

    Args:
      model: (images, key) -> logits (b, classes), the images float32, (x/255 − mean)/std.
      batch: `images` (b, h, w, c) uint8, `labels` (b,), and `mask` (b,), 1 where the image counts.
      key: of what is random in training, or None.
      mean: of pixels in 0..1.
      std: of pixels in 0..1.
      label_smoothing: weight of the uniform distribution in t (Szegedy et al., 2016).
      mixup: a of the Beta(a, a) that says how much of each image is kept; 0: no blending.
      cutmix: the same for the share of its area; 0: no pasting.

    Returns:
      the total, to be divided by `sums["weight"]`, and the sums `nll` (without smoothing), `correct`, `weight`.
    """
    images, mask = scaled(batch["images"], mean, std), batch["mask"].astype(jnp.float32)
    mix, shares = None, None
    if key is not None and (mixup or cutmix):
        key, mix = jax.random.split(key)
        images, shares = mixed(images, mix, mixup, cutmix)
    logits = model(images, key=key)
    log_p = jax.nn.log_softmax(logits)
    targets = jax.nn.one_hot(batch["labels"], logits.shape[-1])
    if shares is not None:
        kept = shares[:, None]
        targets = kept * targets + (1.0 - kept) * jnp.roll(targets, 1, 0)
    nll = jnp.sum(mask * -jnp.sum(targets * log_p, -1))
    smooth = jnp.sum(mask * -jnp.mean(log_p, -1))
    total = (1.0 - label_smoothing) * nll + label_smoothing * smooth
    guessed = jnp.argmax(logits, -1) == batch["labels"]
    return total, dict(nll=nll, correct=jnp.sum(mask * guessed), weight=jnp.sum(mask))


def scaled(images: Array, mean: float, std: float) -> Array:
    """Return uint8 images as the model takes them, (x/255 − mean)/std, float32."""
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def mixed(images: Array, key: Array, mixup: float, cutmix: float) -> tuple[Array, Array]:
    """Return images (b, h, w, c), each mixed with the one before it, and the share (b,) of itself that each keeps."""
    b, h, w, _ = images.shape
    which, share, row, column = jax.random.split(key, 4)
    other = jnp.roll(images, 1, 0)
    paste = jax.random.bernoulli(which) if mixup and cutmix else jnp.bool_(bool(cutmix))
    a = jnp.where(paste, cutmix, mixup)
    kept = jax.random.beta(share, a, a, (b,))
    blended = kept[:, None, None, None] * images + (1.0 - kept[:, None, None, None]) * other
    side = jnp.sqrt(1.0 - kept)  # the rectangle's, as a share of the image's, its centre anywhere
    inside_rows, tall = _span(row, h, side)
    inside_columns, wide = _span(column, w, side)
    inside = inside_rows[:, :, None, None] & inside_columns[:, None, :, None]
    pasted = jnp.where(inside, other, images)
    return jnp.where(paste, pasted, blended), jnp.where(paste, 1.0 - tall * wide / (h * w), kept)


def _span(key: Array, size: int, side: Array) -> tuple[Array, Array]:
    """Return which of `size` places (b, size) an interval with a random centre covers, and how many (b,)."""
    centre = jax.random.uniform(key, side.shape) * size
    low = jnp.clip(jnp.round(centre - side * size / 2), 0, size)
    high = jnp.clip(jnp.round(centre + side * size / 2), 0, size)
    places = jnp.arange(size)
    return (places >= low[:, None]) & (places < high[:, None]), high - low


LOSSES: dict[str, Loss] = {"lm": lm, "mlm": mlm, "classify": classify}


def loss_of(config: Config) -> Loss:
    """Return the loss of a resolved config's task with its options bound: loss(model, batch, key)."""
    c, image = config.train, config.image
    text: dict[str, Any] = dict(chunk=c.loss_chunk, z_loss=c.z_loss)
    options: dict[str, dict[str, Any]] = dict(
        lm=text,
        mlm=text,
        classify=dict(
            mean=image.mean,
            std=image.std,
            label_smoothing=image.label_smoothing,
            mixup=image.mixup,
            cutmix=image.cutmix,
        ),
    )
    return partial(LOSSES[config.model.task], **options[config.model.task])


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

    def piece(carry: tuple, xs: tuple[Array, Array, Array]) -> tuple[tuple, Array | None]:
        (total, nll, correct), d_kernel = carry
        h, target, weight = xs
        logits, hot, log_z, right, guessed = _compared(vocab, kernel, h, target)
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
    rows = (_cut(hidden, chunk), _cut(targets, chunk), _cut(mask, chunk))
    (sums, d_kernel), d_hidden = jax.lax.scan(piece, start, rows)
    if d_hidden is not None:
        d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(b, -1, d)[:, :t]
    return sums, d_hidden, d_kernel


def _cut(x: Array, chunk: int) -> Array:
    """Return (pieces, b, c, ...) of (b, t, ...), padded with zeros; as even as pieces of at most `chunk` can be."""
    b, t = x.shape[:2]
    pieces = -(-t // chunk)
    chunk = -(-t // pieces)
    x = jnp.pad(x, ((0, 0), (0, pieces * chunk - t)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(b, pieces, chunk, *x.shape[2:]), 1, 0)


def _compared(vocab: int, kernel: Array, hidden: Array, targets: Array) -> tuple[Array, Array, Array, Array, Array]:
    """Return the logits (b, c, v), which of them are the targets', log Z, the targets' logits, and which are highest.

    Sums and maxima, as these stay where the vocabulary is split; a look-up or argmax would gather the logits. All
    sums go over the same logits, so that they are one pass.
    """
    ids = jnp.arange(kernel.shape[1])
    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    logits = jnp.where(ids < vocab, logits, -jnp.inf)
    hot = ids == targets[..., None]
    highest = jnp.max(logits, -1)
    log_z = highest + jnp.log(jnp.sum(jnp.exp(logits - highest[..., None]), -1))
    right = jnp.sum(jnp.where(hot, logits, 0.0), -1)
    before = jnp.sum(jnp.where((logits == highest[..., None]) & (ids < targets[..., None]), 1.0, 0.0), -1)
    return logits, hot, log_z, right, (right == highest) & (before == 0)  # of equal guesses the first counts


def token_scores(chunk: int, vocab: int, hidden: Array, kernel: Array, targets: Array) -> tuple[Array, Array]:
    """Return log p of each target in nats and whether it is the likeliest id, (b, t) each.

    As `cross_entropy`, with the logits of `chunk` positions at a time, but nothing is added up.
    """

    def scan(kernel: Array, hidden: Array, targets: Array) -> tuple:
        def piece(carry: tuple, xs: tuple[Array, Array]) -> tuple[tuple, tuple[Array, Array]]:
            _, _, log_z, right, guessed = _compared(vocab, kernel, *xs)
            return carry, (right - log_z, guessed)

        _, scores = jax.lax.scan(piece, (), (_cut(hidden, chunk), _cut(targets, chunk)))
        b, t = targets.shape
        return (), jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(b, -1)[:, :t], scores), None

    return over_batch(scan, kernel, hidden, targets)[1]


def _forward(chunk, z_loss, vocab, hidden, kernel, targets, mask):
    sums, d_hidden, d_kernel = _sums(chunk, z_loss, vocab, True, hidden, kernel, targets, mask)
    return sums, (d_hidden, d_kernel.astype(kernel.dtype))


def _backward(chunk, z_loss, vocab, residuals, g):
    d_hidden, d_kernel = residuals
    scale = g[0]
    return (d_hidden * scale).astype(d_hidden.dtype), (d_kernel * scale).astype(d_kernel.dtype), None, None


cross_entropy.defvjp(_forward, _backward)
