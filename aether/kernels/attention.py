"""Attention: scores, their normalisation over the keys that a mask admits, and the weighted mean of values.

Axes: b batch, t query, s key, h heads, g key/value heads, r = h/g query heads a key/value head, k head width. Within
this module queries are (b, g, r, t, k), so that the r heads which share keys meet them in one product, uncopied.
"""

from dataclasses import replace

from jax import Array

from aether.kernels import flash
from aether.kernels.blockwise import blockwise
from aether.kernels.masks import Mask
from aether.kernels.normalization import Normalization
from aether.kernels.scores import DotScore, Score, YatScore
from aether.kernels.yat import product

__all__ = ["IMPLS", "DotScore", "Score", "YatScore", "attention", "check_form", "plain"]

IMPLS = ("auto", "plain", "blockwise", "flash")
BLOCK = 256  # about the fastest on CPU at lengths 1024 to 4096, with one head or many


def attention(
    q: Array,
    k: Array,
    v: Array,
    score: Score,
    *,
    mask: Mask | None = None,
    normalization: Normalization | None = None,
    impl: str = "plain",
    block: int | None = None,
) -> Array:
    """Return Σ_s w_s v_s with the weights w that `normalization` makes of the scores `mask` admits.

    Args:
      q: (b, t, h, k).
      k: (b, s, g, k) with g dividing h: query head i reads key head i // (h/g).
      v: (b, s, g, any width).
      score: `DotScore` or `YatScore`.
      mask: which keys a query sees; all by default. A query that sees none gets exact zeros.
      normalization: softmax by default.
      impl: "plain" holds all scores and can be differentiated twice; "blockwise" never holds more than a block's;
        "flash" is a kernel written for the platform, that of the mesh in force or of the default device. "auto" takes
        flash where there is a kernel that does what is asked, else plain where a single block would hold all scores
        of a head, else blockwise. A single query, as in decoding, has a single row of scores and takes "plain" always.
      block: largest number of queries, and of keys, in a block of the blockwise form; 256 by default, fewer if a
        window is narrow. Kernels choose their own.

    Returns:
      (b, t, h, v's width) in v's dtype; scores and weights are float32, products accumulate in float32.

    Raises:
      ValueError: shapes do not fit one another, the mask does not fit them, an option is unknown, or impl is "flash"
        and there is no kernel that does this here.
    """
    _check_operands(q, k, v)
    (b, t, h, _), (s, g) = q.shape, k.shape[1:3]
    normalization = (normalization or Normalization()).checked()
    check_form(impl, block)
    _check_score(score, normalization)
    mask = (mask or Mask()).checked(b, g, h // g, t, s)
    q = q.reshape(b, t, g, h // g, -1).transpose(0, 2, 3, 1, 4)
    k, v = (a.transpose(0, 2, 1, 3) for a in (k, v))
    if impl in ("flash", "auto") and t > 1:
        missing = flash.unsupported(q, k, v, score, mask, normalization)
        if missing and impl == "flash":
            raise ValueError(f'impl is "flash". {missing} Take impl="auto", or "blockwise".')
        impl = "flash" if not missing else "plain" if max(t, s) <= BLOCK else "blockwise"
    if impl == "plain" or t == 1:
        y = plain(q, k, v, score, mask, normalization)
    elif impl == "flash":
        y = flash.flash(q, k, v, score, mask, normalization)
    else:
        if isinstance(score, YatScore):  # to save memory is of no use within a block, and costs time
            score = replace(score, nonnegative_bias=False)
        block = block or min(BLOCK, max(64, (mask.window or 4 * BLOCK) // 4))
        y = blockwise(q, k, v, score, mask, normalization, block)
    return y.transpose(0, 3, 1, 2, 4).reshape(b, t, h, -1)


def plain(q: Array, k: Array, v: Array, score: Score, mask: Mask, normalization: Normalization) -> Array:
    """Attend with whole score matrices: q (b, g, r, t, k), k and v (b, g, s, k) -> (b, g, r, t, k)."""
    seen = mask.block(0, q.shape[-2], 0, k.shape[-2])
    if q.shape[2] > 1:
        k, v, heads = k[:, :, None], v[:, :, None], q.shape[1:3]
    else:  # an axis of 1 would cost a fifth of the time on CPU
        q, seen, heads = q[:, :, 0], None if seen is None else seen[:, :, 0], q.shape[1:2]
    weights = normalization.by_head(*heads).weights(score(q, k), seen)
    y = product("...ts,...sk->...tk", weights.astype(v.dtype), v).astype(v.dtype)
    return y if len(heads) > 1 else y[:, :, None]


def check_form(impl: str, block: int | None) -> None:
    """Raise a `ValueError` if there is no such form of attention."""
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; it must be one of {', '.join(IMPLS)}.")
    if block is not None and block < 1:
        raise ValueError(f"block is {block}; it must be at least 1, or None for a size that fits.")


def _check_score(score: Score, normalization: Normalization) -> None:
    if isinstance(score, DotScore) and normalization.name != "softmax":
        raise ValueError(f"normalization is {normalization.name!r}; products may be negative and take only softmax.")


def _check_operands(q: Array, k: Array, v: Array) -> None:
    shapes = f"q, k and v are {q.shape}, {k.shape} and {v.shape}"
    if q.ndim != 4 or k.ndim != 4 or k.shape[:3] != v.shape[:3] or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"{shapes}; they must be (b, t, h, k), (b, s, g, k) and (b, s, g, any).")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{shapes}; q's heads, {q.shape[2]}, must be a multiple of k's, {k.shape[2]}.")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; cast all to the compute dtype.")
