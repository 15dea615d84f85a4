"""Data in the plane: `count` points (count, 2) and their classes (count,), from a generator."""

import numpy as np

Data = tuple[np.ndarray, np.ndarray]


def clusters(rng: np.random.Generator, count: int, places: int, classes: int, radius: float = 1.7) -> Data:
    """Draw normal clusters (standard deviation 0.35) on a circle around the origin; classes follow one another."""
    which = np.arange(count) % places
    centres = radius * circle(2 * np.pi * (which + 0.5) / places)
    return (centres + 0.35 * rng.normal(size=(count, 2))).astype(np.float32), which % classes


def moons(rng: np.random.Generator, count: int) -> Data:
    """Draw two half circles that reach into one another."""
    label = np.arange(count) % 2
    sign = 1 - 2 * label[:, None]
    x = sign * (1.3 * circle(np.pi * rng.random(count)) - [0.65, 0.35])
    return (x + 0.15 * rng.normal(size=(count, 2))).astype(np.float32), label


def rings(rng: np.random.Generator, count: int) -> Data:
    """Draw a disc and a ring around it."""
    label = np.arange(count) % 2
    radius = np.where(label, 2.0, 0.6) + 0.25 * rng.normal(size=count)
    return (radius[:, None] * circle(2 * np.pi * rng.random(count))).astype(np.float32), label


def circle(angle: np.ndarray) -> np.ndarray:
    """Return the points of the unit circle at these angles."""
    return np.stack([np.cos(angle), np.sin(angle)], -1)
