"""Flash attention by the kernel of the platform that the program is compiled for."""

from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType

from aether.kernels.masks import Mask
from aether.kernels.normalization import Normalization
from aether.kernels.pallas.device import device
from aether.kernels.scores import DotScore, Score, YatScore

PLATFORMS = ("tpu", "gpu")


def kernels(platform: str) -> ModuleType:
    """Return the module of a platform's kernels: `unsupported`, `forward` and `backward`; imported when needed."""
    if platform == "tpu":
        from aether.kernels.pallas import tpu

        return tpu
    from aether.kernels.pallas import gpu

    return gpu


def unsupported(q: Array, k: Array, v: Array, score: Score, mask: Mask, normalization: Normalization) -> str:
    """Return "" if the platform has a kernel for this, else one sentence that says what is missing."""
    platform, kind = device()
    if platform not in PLATFORMS:
        return f"There is no flash kernel for {platform} ({kind}), only for {', '.join(PLATFORMS)}."
    mesh = jax.sharding.get_abstract_mesh()
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    if left := [f"{a}={mesh.shape[a]}" for a, kind in types if kind != AxisType.Manual and mesh.shape[a] > 1]:
        return f"The compiler cannot split a kernel over mesh axes that do not divide the operands, {', '.join(left)}."
    missing = _unsupported(score, mask, normalization) or kernels(platform).unsupported(q, k, v)
    return f"The flash kernel for {platform} does not take {missing}." if missing else ""


def _unsupported(score: Score, mask: Mask, normalization: Normalization) -> str:
    """Return "" if every platform's kernel does this, else what none does, as one clause."""
    if not isinstance(score, DotScore | YatScore):
        return f"a score of type {type(score).__name__}"
    if isinstance(score, YatScore) and score.distance != "expanded":
        return f"distance={score.distance!r}"
    if normalization.name not in ("softmax", "l1"):
        return f"normalization={normalization.name!r}"
    return "a dense mask" if mask.dense is not None else ""


def flash(
    q: Array,
    k: Array,
    v: Array,
    score: Score,
    mask: Mask,
    normalization: Normalization,
    *,
    platform: str | None = None,
    **options: Any,
) -> Array:
    """Attend: the same as `aether.kernels.attention.plain` up to rounding, gradients too, in linear memory.

    Args:
      q: (b, g, r, t, k).
      k: (b, g, s, k).
      v: (b, g, s, any).
      score: `DotScore` or `YatScore`.
      mask: without `dense`.
      normalization: softmax or L1.
      platform: whose kernel; of the device by default.
      **options: of the kernel, such as `interpret=True`, with which it runs anywhere, slowly.
    """
    score = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), score)
    static = (platform or device().platform, tuple(sorted(options.items())))
    return _flash(static, q, k, v, score, normalization.by_head(*q.shape[1:3]), mask)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(static, q, k, v, score, n, mask):
    return _forward(static, q, k, v, score, n, mask)[0]


def _forward(static, q, k, v, score, n, mask):
    platform, options = static
    y, level = kernels(platform).forward(q, k, v, score, mask, n, **dict(options))
    return y, (q, k, v, score, n, mask, y, level)


def _backward(static, residuals, g):
    platform, options = static
    q, k, v, score, n, mask, y, level = residuals
    centre = jnp.sum(g.astype(jnp.float32) * y.astype(jnp.float32), -1, keepdims=True)
    dq, dk, dv, dscore = kernels(platform).backward(q, k, v, score, mask, n, level, centre, g, **dict(options))
    return dq, dk, dv, dscore, n.constant_gradient(level, centre), None


_flash.defvjp(_forward, _backward)
