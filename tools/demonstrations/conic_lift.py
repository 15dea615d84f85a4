"""The boundary of a ⵟ unit is a conic, and a plane in lifted coordinates.

python -m tools.demonstrations.conic_lift --out=docs/demonstrations/conic_lift.png
"""

import sys
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import flags

from aether.figures import INK, MUTED
from aether.kernels.yat import yat
from launch import cli
from tools.demonstrations.picture import COLORS, MARKERS, define, finish, mesh, panels, plane, rounded, scatter

PROTOTYPE = (Fraction(4, 5), Fraction(3, 5))
BIAS, EPSILON = Fraction(0), Fraction(1, 2)
LEVELS = (Fraction(2), Fraction(1), Fraction(1, 2))
LIMITS = (-3.0, 3.0)

FLAGS = define()


def plane_of(w: Sequence[Any], b: Any, epsilon: Any, c: Any) -> tuple[Any, ...]:
    """Return the normal a of the plane a·lift(x) = 0 on which the unit (x·w + b)²/(‖x − w‖² + ε) equals c.

    a·lift(x) = (x·w + b)² − c (‖x − w‖² + ε), which is positive where the unit is above c.
    """
    w1, w2 = w
    square = w1 * w1 + w2 * w2
    quadratic = (w1 * w1 - c, 2 * w1 * w2, w2 * w2 - c)
    return (*quadratic, 2 * (b + c) * w1, 2 * (b + c) * w2, b * b - c * (square + epsilon))


def lift(x1: Any, x2: Any) -> tuple[Any, ...]:
    """Return the lifted coordinates (x₁², x₁x₂, x₂², x₁, x₂, 1)."""
    return x1 * x1, x1 * x2, x2 * x2, x1, x2, 1


def side(a: Sequence[Any], x1: Any, x2: Any) -> Any:
    """Return a·lift(x)."""
    return sum(k * v for k, v in zip(a, lift(x1, x2), strict=True))


def discriminant(a: Sequence[Any]) -> Any:
    """Return a₂² − 4 a₁a₃, which is 4c(‖w‖² − c)."""
    return a[1] * a[1] - 4 * a[0] * a[2]


def highest(w: Sequence[Any], b: Any, epsilon: Any) -> Any:
    """Return the largest response, ‖w‖² + (‖w‖² + b)²/ε; it is taken at w + εw/(‖w‖² + b)."""
    square = w[0] * w[0] + w[1] * w[1]
    return square + (square + b) * (square + b) / epsilon


def classify(w: Sequence[Any], b: Any, epsilon: Any, c: Any) -> str:
    """Name the boundary at the level c > 0: by the discriminant, and by the highest response where that is ≥ c."""
    sign = discriminant(plane_of(w, b, epsilon, c))
    if sign > 0:
        return "hyperbola"
    if c >= (top := highest(w, b, epsilon)):
        return "point" if c == top and sign < 0 else "nothing"
    return "ellipse" if sign < 0 else "parabola"


def response(x: np.ndarray) -> np.ndarray:
    """Return Aether's unit at points (..., 2)."""
    w = jnp.array([[float(v)] for v in PROTOTYPE])
    return np.asarray(yat(jnp.asarray(x), w, bias=float(BIAS), epsilon=float(EPSILON)))[..., 0]


def draw_plane(axis: Any, title: str, c: float, points: np.ndarray) -> list[np.ndarray]:
    """Draw the level of the unit over the plane with points on both sides; return the lines of the level."""
    plane(axis, title, LIMITS)
    x = mesh(LIMITS)
    y = response(x)
    levels = np.linspace(0, float(highest(PROTOTYPE, BIAS, EPSILON)), 16)
    axis.contourf(x[..., 0], x[..., 1], y, levels, cmap="Oranges", alpha=0.6)
    lines = axis.contour(x[..., 0], x[..., 1], y, [c], colors=INK, linewidths=2).allsegs[0]
    scatter(axis, points, (response(points) > c).astype(int))
    axis.plot(*map(float, PROTOTYPE), marker="*", markersize=15, color=INK, markeredgecolor="white")
    return lines


def draw_lift(axis: Any, a: Sequence[float], points: np.ndarray, above: np.ndarray, lines: list[np.ndarray]) -> None:
    """Draw the lift (x₁, x₂, z), z the negative quadratic part of a·lift(x), as a net, and the plane that cuts it."""
    bowl = lambda x1, x2: -(a[0] * x1**2 + a[1] * x1 * x2 + a[2] * x2**2)  # noqa: E731
    x1, x2 = np.moveaxis(mesh(LIMITS, 13), -1, 0)
    axis.plot_surface(x1, x2, a[3] * x1 + a[4] * x2 + a[5], color=COLORS[2], alpha=0.3, rstride=12, cstride=12)
    axis.plot_wireframe(x1, x2, bowl(x1, x2), color=MUTED, linewidth=0.6)
    for label in (0, 1):
        p = points[above == label].T
        axis.scatter(*p, bowl(*p), s=14, color=COLORS[label], marker=MARKERS[label], depthshade=False)
    for line in lines:
        axis.plot(*line.T, bowl(*line.T), color=INK, linewidth=2.2, zorder=10)
    axis.view_init(elev=18, azim=-60)
    axis.set_box_aspect((1, 1, 0.8), zoom=1.2)
    axis.set(xticks=[], yticks=[], zticks=[])
    axis.set_xlabel("x₁", fontsize=12, color=INK, labelpad=-12)
    axis.set_ylabel("x₂", fontsize=12, color=INK, labelpad=-12)


def main(values: flags.FlagValues) -> None:
    """Draw three levels of one unit and their planes; count the points that the plane puts where the unit does."""
    cli.require(values, "out", "docs/demonstrations/conic_lift.png")
    rng = np.random.default_rng(values.seed)
    points, many = (rng.uniform(*LIMITS, size=(n, 2)).astype(np.float32) for n in (160, 10_000))
    figure, axes = panels("Boundaries of a ⵟ unit: conics here, planes in lifted coordinates", 2, len(LEVELS), 6.9)
    numbers: dict[str, Any] = dict(highest=highest(PROTOTYPE, BIAS, EPSILON))
    for (upper, lower), c in zip(axes.T, LEVELS, strict=True):
        a, name = plane_of(PROTOTYPE, BIAS, EPSILON, c), classify(PROTOTYPE, BIAS, EPSILON, c)
        normal = [float(k) for k in a]
        agree = (side(normal, *many.T.astype(np.float64)) > 0) == (response(many) > float(c))
        numbers[name] = dict(c=c, discriminant=discriminant(a), agree=np.sum(agree), of=len(many))
        lines = draw_plane(upper, f"{name}, c = {float(c):g}", float(c), points)
        lower.remove()
        space = figure.add_subplot(lower.get_subplotspec(), projection="3d")
        draw_lift(space, normal, points, (response(points) > float(c)).astype(int), lines)
    finish(values, figure, rounded(numbers))


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
