"""The optimizer: optax's, with decay masks, learning rates by parameter path, and schedules."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from optax.contrib import MuonDimensionNumbers

from aether.config import ModelConfig, OptimConfig
from aether.config.kinds import GROUP_RATES
from aether.errors import InputError


def name(path: tuple) -> str:
    """Return a parameter's path as in `blocks/mlp/hidden/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def check_expressions(c: OptimConfig) -> None:
    """Raise `InputError` unless every expression over parameter paths is a regular expression."""
    expressions = [(key, getattr(c, key)) for key in ("no_decay", "no_muon", "hold_norm")]
    for key, expression in [*expressions, *(("lr_scale", e) for e in c.lr_scale)]:
        try:
            re.compile(expression)
        except re.error as e:
            raise InputError(f"optim.{key} has {expression!r}, which is not a regular expression: {e}.") from None


def make_optimizer(c: OptimConfig) -> optax.GradientTransformation:
    """Return the transformation from gradients to steps of learning rate 1: clip, AdamW or Muon, decay.

    Muon orthogonalises the matrices inside the stacked blocks, and kernels of convolutions as matrices from patches to
    features; embeddings, stem, head, vectors and what `no_muon` finds stay with Adam. Its steps are scaled to Adam's
    size (Liu et al., 2025, arXiv 2502.16982), so that both share one learning rate.
    """
    check_expressions(c)
    adam = optax.chain(optax.scale_by_adam(c.beta1, c.beta2, c.eps), optax.scale(-1.0))
    muon = optax.contrib.muon(
        1.0,
        beta=c.momentum,
        eps=c.eps,
        adam_b1=c.beta1,
        adam_b2=c.beta2,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=partial(_muon_axes, c),
    )
    return optax.chain(
        optax.clip_by_global_norm(c.clip) if c.clip else optax.identity(),
        muon if c.name == "muon" else adam,
        optax.add_decayed_weights(-c.weight_decay, lambda params: decay_mask(c, params)),
    )


def _muon_axes(c: OptimConfig, params: Any) -> Any:
    def one(path: tuple, v: nnx.Variable) -> MuonDimensionNumbers | None:
        if c.no_muon and re.search(c.no_muon, name(path)):
            return None
        axes = v.get_metadata()["axes"]
        inside = axes[1:] if axes[0] == "layers" else axes
        stacked, n = len(axes) - len(inside), len(axes)
        if stacked and len(inside) == 2:
            return MuonDimensionNumbers(1, 2)
        window = len(inside) > 2 and None not in inside[-2:]  # a convolution's kernel: (window and channels) x features
        return MuonDimensionNumbers(tuple(range(stacked, n - 1)), n - 1) if window else None

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=lambda v: isinstance(v, nnx.Variable))


def decay_mask(c: OptimConfig, params: Any) -> Any:
    """Return True for the parameters to decay: those that are matrices in each layer and not named by `no_decay`."""

    def one(path: tuple, v: nnx.Variable) -> bool:
        axes = [a for a in v.get_metadata()["axes"] if a != "layers"]
        return len(axes) > 1 and not (c.no_decay and re.search(c.no_decay, name(path)))

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=lambda v: isinstance(v, nnx.Variable))


def learning_rate_scales(c: OptimConfig, params: Any, model: ModelConfig) -> Any:
    """Return each parameter's learning rate factor, that of the first expression in `lr_scale` found in its path.

    With `rates="grouped"` times that of its group (`aether.config.kinds.GROUP_RATES`), and times base_width / width of
    kernels in wider networks, each of which sums over a number of inputs that grows with the width: Adam's steps have
    one size whatever the gradient's, so that their sum would grow as well (Yang et al., 2022, arXiv 2203.03466). Tables
    are read row by row, patches have as many pixels in all networks, and both keep theirs; α is as much larger in wider
    ones as its steps then are. Kernels of blocks also times √(base_layers / layers) in deeper networks, whose blocks
    all add to one stream.

    Args:
      c: resolved.
      params: shapes are enough.
      model: resolved.

    Raises:
      InputError: an expression that is not valid, or that no path matches.
    """
    check_expressions(c)
    unused = set(c.lr_scale)

    def first(factors: Mapping[str, float], path: tuple) -> float:
        for expression, factor in factors.items():
            if re.search(expression, name(path)):
                unused.discard(expression)
                return factor
        return 1.0

    def by_width(path: tuple) -> float:
        stream, heads = model.times_wider
        if name(path).endswith("kernel") and not name(path).startswith("patches"):
            return min(1.0, c.base_width / model.width)
        return {"attention/alpha": heads**1.5, "hidden/alpha": stream}.get("/".join(name(path).split("/")[-2:]), 1.0)

    def by_depth(path: tuple) -> float:
        inside = name(path).startswith("blocks/") and name(path).endswith("kernel")
        return (c.base_layers / model.layers) ** 0.5 if inside and 0 < c.base_layers < model.layers else 1.0

    def one(path: tuple, v: nnx.Variable) -> float:
        factor = first(c.lr_scale, path)
        if c.rates == "grouped":
            factor *= first(GROUP_RATES, path) * by_width(path) * by_depth(path)
        return factor

    scales = jax.tree_util.tree_map_with_path(one, params, is_leaf=lambda v: isinstance(v, nnx.Variable))
    if unused:
        paths = [name(p) for p, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
        raise InputError(
            f"optim.lr_scale has {sorted(unused)[0]!r}, which no parameter path contains; there are {', '.join(paths)}."
        )
    return scales


def make_hold(c: OptimConfig, params: Any) -> Callable[[Any, Any], Any]:
    """Return (new, old) -> new parameters, the columns of those found by `hold_norm` with the norms they have in old.

    A column of a kernel is what one output takes of all inputs: in a ⵟ layer, a prototype. To a spherical unit its
    scale means nothing; left alone it grows, since its gradient is orthogonal to it, and turns ever less (nGPT holds
    all of them at 1: Loshchilov et al., 2024, arXiv 2410.01131).

    Args:
      c: resolved.
      params: shapes are enough.

    Raises:
      InputError: `hold_norm` is no regular expression, or finds no matrix.
    """
    check_expressions(c)

    matrices = {}
    for path, v in jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda v: isinstance(v, nnx.Variable))[0]:
        axes = v.get_metadata()["axes"]
        if inputs := tuple(range(int(axes[0] == "layers"), len(axes) - 1)):
            matrices[name(path)] = inputs
    over = {key: axes for key, axes in matrices.items() if c.hold_norm and re.search(c.hold_norm, key)}
    if c.hold_norm and not over:
        raise InputError(
            f"optim.hold_norm is {c.hold_norm!r}, found in no matrix's path; there are {', '.join(matrices)}."
        )

    def one(path: tuple, new: Array, old: Array) -> Array:
        axes = over.get(name(path))
        if axes is None:
            return new
        squares = [jnp.sum(x * x, axes, keepdims=True) for x in (new, old)]
        return new * jnp.sqrt(squares[1] / jnp.maximum(squares[0], 1e-30))

    return lambda new, old: jax.tree_util.tree_map_with_path(one, new, old) if over else new


def make_schedule(c: OptimConfig, peak: float | Array | None = None) -> optax.Schedule:
    """Return the learning rate of update k = 1, 2, …: a linear rise over `warmup_steps`, then the shape asked for.

    The peak is `learning_rate`, or `peak`, which may be traced.

    The shape ends after `schedule_steps` at `final_fraction` of the peak and stays there. `wsd` holds the peak and
    falls linearly in the last `decay_fraction` of the schedule (Hu et al., 2024).
    """
    peak = c.learning_rate if peak is None else peak
    final = peak * c.final_fraction
    rest = max(c.schedule_steps - c.warmup_steps, 1)
    fall = min(max(round(c.decay_fraction * c.schedule_steps), 1), rest)
    shapes = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, c.final_fraction),
        "linear": lambda: optax.linear_schedule(peak, final, rest),
        "constant": lambda: optax.constant_schedule(peak),
        "wsd": lambda: optax.linear_schedule(peak, final, fall, rest - fall),
    }
    body = shapes[c.schedule]()
    if not c.warmup_steps:
        return body
    return optax.join_schedules([optax.linear_schedule(0.0, peak, c.warmup_steps), body], [c.warmup_steps])
