"""Where the gradient of a unit's response points, and how long it is: linear, RBF and ⵟ.

python -m tools.demonstrations.gradient_fields --out=docs/demonstrations/gradient_fields.png
"""

import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import Array

from aether.figures import INK, MUTED
from aether.kernels.yat import yat
from launch import cli
from tools.demonstrations.picture import COLORS, GRID, define, finish, mesh, panels, plane, rounded

PROTOTYPE = np.array([1.0, 0.5], np.float32)
EPSILON = 0.5
LIMITS = (-3.0, 3.0)
REACH = 30.0  # of the search for the largest gradient, from the prototype

FLAGS = define()


def linear(x: Array, w: Array) -> Array:
    """Return x·w."""
    return x @ w


def rbf(x: Array, w: Array) -> Array:
    """Return exp(−‖x − w‖²/(2ε)), as narrow at its top as the ⵟ unit's denominator."""
    return jnp.exp(-jnp.sum((x - w) ** 2) / (2 * EPSILON))


def yat_unit(x: Array, w: Array) -> Array:
    """Return (x·w)²/(‖x − w‖² + ε)."""
    return yat(x[None], w[:, None], epsilon=EPSILON, distance="exact")[0, 0]


TITLES = {"linear": "linear: x·w", "RBF": "RBF: exp(−‖x − w‖²)", "ⵟ": "ⵟ: (x·w)²/(‖x − w‖² + ½)"}
UNITS: dict[str, Callable[[Array, Array], Array]] = {"linear": linear, "RBF": rbf, "ⵟ": yat_unit}


def gradients(unit: Callable[[Array, Array], Array], x: np.ndarray) -> np.ndarray:
    """Return ∇ₓ of a unit at points (..., 2)."""
    slope = jax.jit(jax.vmap(jax.grad(unit), (0, None)))
    return np.asarray(slope(jnp.asarray(x.reshape(-1, 2)), jnp.asarray(PROTOTYPE))).reshape(x.shape)


def bound_at(r: np.ndarray, w: np.ndarray, epsilon: float, b: float = 0.0) -> np.ndarray:
    """Bound ‖∇ₓ‖ of a ⵟ unit at the distance r: 2‖w‖n/Q + 2n²r/Q² with n = |‖w‖² + b| + r‖w‖ and Q = r² + ε."""
    length = np.linalg.norm(w)
    n, q = abs(length**2 + b) + r * length, r**2 + epsilon
    return 2 * length * n / q + 2 * n**2 * r / q**2


def bound(w: np.ndarray, epsilon: float, b: float = 0.0) -> float:
    """Bound ‖∇ₓ‖ everywhere: s a²/ε^1.5 + 3 a‖w‖/ε + (1 + s) ‖w‖²/√ε, a = |‖w‖² + b|, s = 3√3/8.

    These are the largest values of 1/Q, r/Q, r/Q², r²/Q² and r³/Q², each at its own r, put into `bound_at`.
    """
    length, s = float(np.linalg.norm(w)), 3 * math.sqrt(3) / 8
    a = abs(length**2 + b)
    return s * a**2 / epsilon**1.5 + 3 * a * length / epsilon + (1 + s) * length**2 / math.sqrt(epsilon)


def largest(field: np.ndarray) -> float:
    """Return the length of the longest vector of a field (..., 2)."""
    return float(np.linalg.norm(field, axis=-1).max())


def around(radii: np.ndarray, directions: int = 360) -> np.ndarray:
    """Return points at distances from the prototype, in all directions: (radii, directions, 2), float32."""
    angle = 2 * np.pi * np.arange(directions) / directions
    circle = np.stack([np.cos(angle), np.sin(angle)], -1)
    return (PROTOTYPE + radii[:, None, None] * circle).astype(np.float32)


def towards(x: np.ndarray, field: np.ndarray) -> float:
    """Return the share of points where going along the field brings one nearer to the prototype."""
    return float(np.mean(np.sum(field * (PROTOTYPE - x), -1) > 0))


def draw_field(axis: Any, title: str, unit: Callable[[Array, Array], Array]) -> None:
    """Draw the response in shades, the gradient's direction by arrows, darker where it is longer."""
    plane(axis, title, LIMITS)
    x = mesh(LIMITS)
    response = jax.vmap(jax.vmap(unit, (0, None)), (0, None))(jnp.asarray(x), jnp.asarray(PROTOTYPE))
    axis.contourf(x[..., 0], x[..., 1], np.asarray(response), 16, cmap="Oranges", alpha=0.6)
    x = mesh(LIMITS, 17)[1:-1, 1:-1]
    field = gradients(unit, x)
    length = np.linalg.norm(field, axis=-1, keepdims=True)
    arrows = field / np.maximum(length, 1e-30) * np.sqrt(length / length.max())
    axis.quiver(*np.moveaxis(x, -1, 0), *np.moveaxis(arrows, -1, 0), color=COLORS[0], scale=17, width=0.006)
    axis.plot(*PROTOTYPE, marker="*", markersize=17, color=INK, markeredgecolor="white")


def draw_lengths(axis: Any, radii: np.ndarray) -> None:
    """Draw the longest gradient at every distance from the prototype, and the ⵟ unit's bound."""
    points = around(radii)
    for (name, unit), color in zip(UNITS.items(), COLORS, strict=False):
        length = np.linalg.norm(gradients(unit, points), axis=-1).max(1)
        axis.loglog(radii, length, color=color, linewidth=2.4, label=name)
    axis.loglog(
        radii, bound_at(radii, PROTOTYPE, EPSILON), color=MUTED, linewidth=1.8, linestyle="--", label="bound of ⵟ"
    )
    axis.set_ylim(1e-3, 3e1)
    axis.set_xlim(radii[0], radii[-1])
    axis.grid(color=GRID)
    axis.set_xlabel("distance from the prototype", fontsize=12, color=INK)
    axis.set_ylabel("longest gradient", fontsize=12, color=INK)
    axis.tick_params(which="both", labelsize=11, colors=INK, length=0)
    for edge in axis.spines.values():
        edge.set_color(MUTED)
    axis.legend(fontsize=12, frameon=False, labelcolor=INK, ncols=2)


def main(values: flags.FlagValues) -> None:
    """Draw the three fields and the lengths of their vectors."""
    cli.require(values, "out", "docs/demonstrations/gradient_fields.png")
    figure, axes = panels("The gradient of a unit's response", 2, 3, 6.6, height_ratios=(3, 2))
    grid, near = mesh(LIMITS, 301), around(np.linspace(0, REACH, 1001))
    numbers: dict[str, Any] = {}
    for axis, (name, unit) in zip(axes[0], UNITS.items(), strict=True):
        draw_field(axis, TITLES[name], unit)
        far = {f"longest_at_{r}": largest(gradients(unit, around(np.array([float(r)])))) for r in (3, 10, 30)}
        front = grid[grid @ PROTOTYPE > 0]
        found = {where: towards(x, gradients(unit, x)) for where, x in (("towards", grid), ("in_front", front))}
        numbers[name] = found | dict(longest=largest(gradients(unit, near))) | far
    numbers["ⵟ"]["bound"] = bound(PROTOTYPE, EPSILON)
    for axis in axes[1]:
        axis.remove()
    draw_lengths(figure.add_subplot(axes[1, 0].get_gridspec()[1, :]), np.geomspace(0.03, REACH, 200))
    finish(values, figure, rounded(numbers))


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
