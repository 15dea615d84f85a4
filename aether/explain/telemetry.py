"""What ⵟ layers do with the inputs of a forward pass, in a few numbers a layer that are cheap enough for training.

They are computed where a layer is called, so that a loop over stacked blocks stays one, whatever their number. Of a
layer with prototypes, over all its inputs or patches x and units w:

- `distance_5`, `distance_50`, `distance_95`: percentiles over the inputs of the distance to the nearest prototype, of
  unit vectors if the layer is spherical;
- `alignment`: the largest |cos(x, w)| over the units, mean over the inputs;
- `epsilon_share`: of the pairs with ‖x − w‖² < ε, whose response is bounded by ε more than by the distance;
- `dead_share`: of the units whose |y| stays below `SILENT` times `scale`; see `aether.explain.survey.silent_units`;
- `scale`: root mean square of y = α (x·w + b)² / (‖x − w‖² + ε);
- `squared_norm`: mean of `aether.explain.capacity.squared_norms` over the units.

Of attention distances, alignment and the share of ε, queries and the keys that they may see in the place of inputs and
prototypes; `entropy` of the weights (nats, mean over queries); and `scale` of what the layer adds to the stream. Linear
attention's weights are those of its kernel, which its features approximate.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from aether.errors import InputError
from aether.explain.capacity import squared_norms
from aether.explain.layers import layers_of, noted
from aether.explain.points import prototypes_of, rows_of
from aether.explain.prototypes import SILENT
from aether.kernels.yat import unit
from aether.nn import YatAttention, YatLinearAttention
from aether.parallel import constrain

QUERIES = 64  # of a row, evenly spaced: those of which attention's numbers are made
PERCENTILES = (5, 50, 95)

Numbers = dict[str, Array]


def telemetry(model: Any, x: np.ndarray, **how: Any) -> dict[str, dict[str, float]]:
    """Return the numbers of every ⵟ layer of a network by name, for ids (b, t) or images (b, s, s, c).

    Args:
      model: the network.
      x: its input.
      **how: keywords of its call, as `segments` and `positions`.

    Raises:
      InputError: there is no such layer.
    """
    if not layers_of(model):
        raise InputError(f"This {model.config.kind} has no ⵟ units, which telemetry is about; give it a ⵟ network.")
    graph, state = nnx.split(model)
    packing = Packing()

    @jax.jit
    def run(state: nnx.State, x: Array, how: dict[str, Array]) -> Array:
        return packing.pack(told(nnx.merge(graph, state), lambda model: model(x, **how)))

    return packing.unpack(run(state, jnp.asarray(x), how))


def told(model: Any, run: Callable[[Any], Any]) -> dict[str, Numbers]:
    """Call run(a copy of the network), which makes one forward pass, and return each ⵟ layer's numbers; to be traced.

    Numbers are float32, products for them of the highest precision; the pass itself is as the network computes it.
    """
    return noted(model, run, _numbers)


class Packing:
    """All numbers as one vector, which is fetched at once; `pack` is traced and remembers what stands where."""

    def __init__(self) -> None:
        self.places: list[tuple[str, str]] = []

    def pack(self, found: dict[str, Numbers]) -> Array:
        """Return the numbers one after the other."""
        self.places = [(layer, name) for layer, numbers in found.items() for name in numbers]
        return jnp.stack([value for numbers in found.values() for value in numbers.values()])

    def unpack(self, vector: Any) -> dict[str, dict[str, float]]:
        """Return the numbers of each layer."""
        numbers: dict[str, dict[str, float]] = {layer: {} for layer, _ in self.places}
        for (layer, name), value in zip(self.places, np.asarray(vector).tolist(), strict=True):
            numbers[layer][name] = value
        return numbers


def _numbers(layer: Any, x: Array, y: Array, how: dict[str, Any]) -> Numbers:
    attends = isinstance(layer, YatAttention | YatLinearAttention)
    with jax.default_matmul_precision("highest"), jax.named_scope("telemetry"):
        return _of_attention(layer, x, y, **how) if attends else _of_prototypes(layer, x)


def _of_prototypes(layer: Any, x: Array) -> Numbers:
    pairs = _compared(rows_of(layer, x), prototypes_of(layer), layer.spherical)
    own = layer.unit()
    y = own["alpha"] * (pairs.dots + own["bias"]) ** 2 / (pairs.squares + own["epsilon"])
    scale = _rms(y)
    return _of_pairs(pairs, own["epsilon"]) | dict(
        dead_share=jnp.mean(jnp.max(jnp.abs(y), 0) < SILENT * scale),
        scale=scale,
        squared_norm=jnp.mean(squared_norms(layer)),
    )


def _of_attention(
    layer: Any,
    x: Array,
    y: Array,
    *,
    is_causal: bool = False,
    segments: Array | None = None,
    positions: Array | None = None,
    **_: Any,
) -> Numbers:
    t, linear = x.shape[1], isinstance(layer, YatLinearAttention)
    q, k = layer.prepare(x, positions) if linear else layer._project(x, x, positions, None)[:2]
    rows = np.linspace(0, t - 1, min(t, QUERIES)).round().astype(int)
    seen = (rows[:, None] >= np.arange(t) if is_causal else np.ones((len(rows), t), bool))[None, None]
    if not linear and layer.window is not None:
        seen &= (rows[:, None] >= np.arange(t)) & (rows[:, None] - np.arange(t) < layer.window)
    if segments is not None:
        seen = seen & (segments[:, rows, None] == segments[:, None, :])[:, None]
    q, k = q[:, rows].swapaxes(1, 2), jnp.repeat(k, q.shape[2] // k.shape[2], 2).swapaxes(1, 2)
    pairs = _compared(q, k, linear or layer.spherical, seen)
    own = dict(layer.options) | dict(alpha=1.0) if linear else layer.unit()
    bias, alpha, epsilon = (jnp.reshape(own[name], (-1, 1, 1)) for name in ("bias", "alpha", "epsilon"))
    scores = alpha * (pairs.dots + bias) ** 2 / (pairs.squares + epsilon)
    if linear:
        weights = jnp.where(seen, scores, 0.0)
    else:
        weights = layer.weighting().by_head(q.shape[1]).weights(scores / q.shape[-1] ** 0.5, seen)
    p = weights / jnp.maximum(jnp.sum(weights, -1, keepdims=True), np.finfo(np.float32).tiny)
    entropy = -jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1.0)), -1)
    return _of_pairs(pairs, epsilon, seen) | dict(entropy=jnp.mean(entropy), scale=_rms(y))


class _Pairs(NamedTuple):
    """Of points (..., n, d) and centres (..., m, d): x·w and ‖x − w‖² of all pairs, and two numbers a point."""

    dots: Array
    squares: Array
    distance: Array
    alignment: Array


def _compared(x: Array, w: Array, spherical: bool, seen: Any = True) -> _Pairs:
    """Compare as a layer does; the nearest centre is found by the expanded distance, its own is by differences."""
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    if spherical:
        x, w = unit(x), unit(w)
    of_x, of_w = jnp.sum(x**2, -1), jnp.sum(w**2, -1)
    lacks = [jnp.where(a < 0.5, 1.0 - a, 0.0) if spherical else jnp.zeros_like(a) for a in (of_x, of_w)]
    dots = jnp.einsum("...nd,...md->...nm", x, w)  # of a zero vector D = 2, though it has no direction
    squares = (of_x + lacks[0])[..., :, None] + (of_w + lacks[1])[..., None, :] - 2.0 * dots
    nearest = jnp.argmin(jnp.where(seen, squares, jnp.inf), -1)
    whole = constrain(w, None, None) if w.ndim == 2 else w  # prototypes lie split over a mesh, and rows are looked up
    apart = jnp.sum((x - jnp.take_along_axis(whole, nearest[..., None], -2)) ** 2, -1)
    apart += lacks[0] + jnp.take_along_axis(lacks[1], nearest, -1)
    cosines = jnp.abs(dots) * (_inverse(of_x)[..., :, None] * _inverse(of_w)[..., None, :])
    return _Pairs(dots, jnp.maximum(squares, 0.0), jnp.sqrt(apart), jnp.max(jnp.where(seen, cosines, 0.0), -1))


def _inverse(square: Array) -> Array:
    return jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def _of_pairs(pairs: _Pairs, epsilon: Any, seen: Any = True) -> Numbers:
    levels = jnp.quantile(pairs.distance, jnp.asarray(PERCENTILES) / 100.0)
    near = (pairs.squares < epsilon).astype(jnp.float32)
    return {f"distance_{p}": level for p, level in zip(PERCENTILES, levels, strict=True)} | dict(
        alignment=jnp.mean(pairs.alignment), epsilon_share=jnp.mean(near, where=jnp.broadcast_to(seen, near.shape))
    )


def _rms(y: Array) -> Array:
    return jnp.sqrt(jnp.mean(y.astype(jnp.float32) ** 2))
