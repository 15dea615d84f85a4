"""A dense ⵟ layer and its linear map, evaluated only at the prototypes that are nearest to each input.

A response falls with the distance, so that near prototypes make most of it. What the others could add at most is known
without a look at them: with S = ‖x‖² + ‖w‖² (2 if spherical), x·w = (S − D)/2, hence of a unit at distance D

    |y| = |α| ((S − D)/2 + b)²/(D + ε),   convex in D + ε > 0,

whose largest value for D_k ≤ D ≤ (‖x‖ + ‖w‖)² is at one of the two ends, D_k the largest distance among those that
were evaluated. The triangle inequality gives D ≥ (‖x‖ − ‖w‖)² besides. Sums over what is left out then bound the map.

The exact search needs x·w of every prototype, as the layer does, and saves only behind it; `Cells` looks at a few cells
of prototypes, by faiss, and its bound takes what the others may hold into account.

Axes: m rows of x, d width, n units, k evaluated, e outputs of the linear map.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from aether.errors import InputError
from aether.kernels.dense import TINY, Form, Operands, multiply, squares
from aether.kernels.tail import FLOOR
from aether.kernels.yat import squared_distances
from aether.nn import YatMLP, YatNMN

_ROWS = 64  # whose rows of the linear map are gathered at a time


class Nearest(NamedTuple):
    """What was evaluated.

    Attributes:
      chosen: (m, k), which units; n where there are fewer.
      y: (m, k), their responses, float32; 0 where there are fewer.
      beyond: no unit left out is nearer than this squared distance, (m, 1); or of each cell (m, cells).
      cell: (n,), where each unit is; None: in one cell.
    """

    chosen: Array
    y: Array
    beyond: Array
    cell: Array | None = None


def nearest(layer: YatNMN, x: Array, k: int) -> Nearest:
    """Evaluate the k nearest units for each row of x (m, d), found by the distances of all, in the layer's own form."""
    x, w, ops = _operands(layer, x)
    dot = multiply("md,dn->mn", x, w) * (ops.x_scale * ops.w_scale)
    if layer.distance == "exact":
        directed = x.astype(jnp.float32) * ops.x_scale, (w.astype(jnp.float32) * ops.w_scale).T
        d = squared_distances(*directed) + (1.0 * jnp.equal(ops.x_scale, 0) + jnp.equal(ops.w_scale, 0))
    else:
        d = jnp.maximum(ops.s - 2.0 * dot, FLOOR * ops.s)
    far, index = jax.lax.top_k(-d, k)
    return Nearest(index, _respond(layer, jnp.take_along_axis(dot, index, -1), -far, index), -far[:, -1:])


def readout(found: Nearest, out: Array) -> Array:
    """Return Σ_k y_k v_k, (m, e), float32, of the rows v (n, e) of a linear map that belong to what was evaluated."""

    def one(row: tuple[Array, Array]) -> Array:
        y, chosen = row
        return multiply("k,ke->e", y, jnp.take(out, chosen, axis=0, mode="clip").astype(jnp.float32))

    return jax.lax.map(one, (found.y, found.chosen), batch_size=_ROWS)


class Bounds(NamedTuple):
    """What the units left out can change at most.

    Attributes:
      units: (m, n), of each |response|; 0 where it was evaluated.
      length: (m,), of the ‖·‖₂ of the linear map's error: Σ_j units_j ‖v_j‖₂.
      outputs: (m, e), of each output's error: ‖units‖₂ times the norm of the map's column (Cauchy–Schwarz).
    """

    units: Array
    length: Array
    outputs: Array


def bounds(layer: YatNMN, x: Array, found: Nearest, out: Array) -> Bounds:
    """Return guaranteed bounds of the error of `found`, for rows x (m, d), with rounding counted in."""
    x, w, ops = _operands(layer, x)
    b, alpha, epsilon = _unit(layer)
    if layer.spherical:
        apart, most = jnp.zeros((1, 1)), jnp.full((1, 1), 4.0)
    else:
        long, lengths = jnp.sqrt(squares(x, -1))[:, None], jnp.sqrt(squares(w, 0))
        apart, most = (long - lengths) ** 2, (long + lengths) ** 2
    beyond = found.beyond if found.cell is None else found.beyond[:, found.cell]
    least = jnp.maximum(jnp.minimum(jnp.maximum(beyond, apart), most) - FLOOR * ops.s, 0.0)
    ends = [
        (jnp.abs((ops.s - d) / 2.0 + b) + FLOOR * (ops.s + d + jnp.abs(b))) ** 2 / (d + epsilon) for d in (least, most)
    ]
    rows = jnp.arange(len(x))[:, None]
    units = jnp.broadcast_to(jnp.abs(alpha) * jnp.maximum(*ends), (len(x), w.shape[1]))
    units = units.at[rows, found.chosen].set(0.0, mode="drop")
    length = multiply("mn,n->m", units, jnp.sqrt(squares(out, 1)))
    return Bounds(units, length, jnp.sqrt(squares(units, -1))[:, None] * jnp.sqrt(squares(out, 0)))


class LazyMLP(nnx.Module):
    """A `YatMLP` that evaluates k of its units; with k of all it is that layer itself."""

    def __init__(self, mlp: YatMLP, k: int):
        units = mlp.hidden.kernel_shape[1]
        if not 1 <= k <= units:
            raise InputError(f"k is {k} and the layer has {units} units; take 1 to {units}.")
        self.mlp, self.k = mlp, k

    def __call__(self, x: Array) -> Array:
        """Map (..., in_features) to (..., out_features)."""
        hidden, out = self.mlp.hidden, self.mlp.out
        if self.k == hidden.kernel_shape[1]:
            return self.mlp(x)
        found = nearest(hidden, x.reshape(-1, x.shape[-1]), self.k)
        y = readout(found, out.kernel[...].astype(hidden.dtype)).astype(hidden.dtype)
        y = y if out.bias is None else y + out.bias[...].astype(y.dtype)
        return y.reshape(*x.shape[:-1], -1)


def lazily(model: Any, share: float) -> Any:
    """Return a copy of a network whose ⵟ-MLPs evaluate this share of their units, rounded up.

    Raises:
      InputError: there are none, or the share is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise InputError(f"The share of units to evaluate is {share}; it must be above 0 and at most 1.")
    model = nnx.merge(*nnx.split(model))
    blocks: list[Any] = [m for _, m in nnx.iter_modules(model) if isinstance(getattr(m, "mlp", None), YatMLP)]
    if not blocks:
        raise InputError("The network has no ⵟ-MLP, which alone can be evaluated lazily.")
    for block in blocks:
        block.mlp = LazyMLP(block.mlp, math.ceil(share * block.mlp.hidden.kernel_shape[1]))
    return model


def scores(model: Any, shares: Sequence[float], score: Callable[[Any], dict[str, float]]) -> list[dict[str, float]]:
    """Return score(network) as the share of units that its ⵟ-MLPs evaluate falls, one row a share."""
    return [dict(share=share) | score(lazily(model, share)) for share in shares]


def errors(mlp: YatMLP, x: Array, counts: Sequence[int]) -> list[dict[str, float]]:
    """Return for each k in `counts` the relative error of the layer's output for rows x (m, d), and its bound.

    Both are ‖·‖ over all rows and outputs, by that of the output without its bias.
    """
    hidden, out, rows = mlp.hidden, mlp.out.kernel[...].astype(jnp.float32), []
    every = nearest(hidden, x, hidden.kernel_shape[1])
    size = jnp.linalg.norm(readout(every, out))
    for k in counts:
        found = nearest(hidden, x, k)
        rest = Nearest(every.chosen[:, k:], every.y[:, k:], every.beyond)
        error = jnp.linalg.norm(readout(rest, out)) if k < every.chosen.shape[1] else 0.0
        bound = jnp.linalg.norm(bounds(hidden, x, found, out).length)
        shares = dict(k=k, share=k / hidden.kernel_shape[1], error=error / size, bound=bound / size)
        rows.append({name: float(value) for name, value in shares.items()})
    return rows


class Cells:
    """The prototypes of a layer in cells around means (faiss, IVF), of which a search looks at the nearest few.

    Args:
      layer: whose prototypes; later changes of it are not followed.
      cells: how many; 4 √n by default, as faiss advises.
      probes: cells that a search looks at.

    Raises:
      InputError: faiss is not installed, or there are not as many prototypes as cells, or cells as probes.
    """

    def __init__(self, layer: YatNMN, cells: int = 0, probes: int = 8):
        faiss = _faiss()
        _, w, ops = _operands(layer, jnp.zeros((1, layer.kernel_shape[0])))
        self.layer, self.rows = layer, np.ascontiguousarray(np.asarray(w.astype(jnp.float32) * ops.w_scale).T)
        self.squares = np.sum(self.rows**2, -1)
        n, d = self.rows.shape
        cells = cells or min(n, round(4 * math.sqrt(n)))
        if not 1 <= probes <= cells <= n:
            raise InputError(
                f"{probes} probes of {cells} cells of {n} prototypes: take 1 probe or more, not more than there are."
            )
        self.probes, self.means = probes, faiss.IndexFlatL2(d)
        self.index = faiss.IndexIVFFlat(self.means, d, cells)
        self.index.nprobe = probes
        self.index.cp.min_points_per_centroid = 1  # it warns below 39
        self.index.train(self.rows)
        self.index.add(self.rows)
        apart, self.cell = (a[:, 0] for a in self.means.search(self.rows, 1))
        self.radius = np.zeros(cells)
        np.maximum.at(self.radius, self.cell, np.sqrt(apart))

    def nearest(self, x: Array, k: int) -> Nearest:
        """Evaluate for each row of x (m, d) the k nearest units in the cells whose means are nearest to it."""
        points = np.asarray(x.astype(self.layer.dtype), np.float32)
        if self.layer.spherical:
            square = np.sum(points**2, -1, keepdims=True)
            points = points * np.where(square > TINY, 1.0 / np.sqrt(np.maximum(square, TINY)), 0.0)
        from_means, order = self.means.search(points, len(self.radius))
        probed = np.ascontiguousarray(order[:, : self.probes])
        d, index = self.index.search_preassigned(points, k, probed, np.ascontiguousarray(from_means[:, : self.probes]))
        beyond = np.zeros(order.shape)
        gap = np.sqrt(from_means) - self.radius[order]
        np.put_along_axis(beyond, order, np.maximum(gap, 0.0) ** 2, -1)
        inside = np.maximum(np.take_along_axis(beyond, probed, -1), d[:, -1:])
        np.put_along_axis(beyond, probed, inside, -1)
        at = np.maximum(index, 0)
        dot = (
            np.sum(points**2, -1)[:, None] + self.squares[at] - d
        ) / 2.0  # for no row of the prototypes is read again
        apart = np.maximum(2.0 - 2.0 * dot, 2.0 * FLOOR) if self.layer.spherical else np.maximum(d, 0.0)
        y = _respond(self.layer, *(jnp.asarray(a) for a in (dot, apart, at)))
        chosen = jnp.asarray(np.where(index < 0, len(self.rows), index))
        return Nearest(chosen, jnp.where(index < 0, 0.0, y), jnp.asarray(beyond, jnp.float32), jnp.asarray(self.cell))


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise InputError("The approximate search needs faiss; pip install 'aether[faiss]' brings it.") from None
    return faiss


def _operands(layer: YatNMN, x: Array) -> tuple[Array, Array, Operands]:
    """Return x and the prototypes in the compute dtype, and what the layer's distances need of them."""
    x, w = x.astype(layer.dtype), layer.prototypes(None, layer.dtype)
    form = Form("direction" if layer.spherical else "point", False, True, x.dtype)
    return x, w, form.operands(x, w)


def _unit(layer: YatNMN) -> tuple[Array, Any, Any]:
    unit = layer.unit()
    return jnp.broadcast_to(unit["bias"], layer.kernel_shape[1:]), unit["alpha"], unit["epsilon"]


def _respond(layer: YatNMN, dot: Array, d: Array, index: Array) -> Array:
    """Return α (x·w + b)²/(D + ε) of the units of `index`."""
    b, alpha, epsilon = _unit(layer)
    return alpha * (dot + jnp.take(b, index, mode="clip")) ** 2 / (d + epsilon)
