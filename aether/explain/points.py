"""Prototypes and inputs of a layer as the points that it compares."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from aether.nn import YatConv


def prototypes_of(layer: Any) -> Array:
    """Return the prototypes as rows (units, d), float32; may be traced."""
    kernel = layer.prototypes(None, "float32")
    return kernel.reshape(-1, kernel.shape[-1]).T


def centres_of(layer: Any) -> np.ndarray:
    """Return the prototypes as the layer compares them, (units, d), float64: of length 1 if it is spherical."""
    centres = np.asarray(prototypes_of(layer), np.float64)
    return directions(centres) if layer.spherical else centres


def rows_of(layer: Any, x: Any) -> Any:
    """Return what the prototypes of a layer are compared with, (n, d): rows of its input, of a convolution patches.

    The entries of a patch are in the order of the kernel's. May be traced.
    """
    if not isinstance(layer, YatConv):
        return x.reshape(-1, x.shape[-1])
    padded, window = layer.window(jnp.asarray(x).reshape(-1, *x.shape[-len(layer.kernel_shape) + 1 :]))
    patches = window.patches(padded)
    return patches.reshape(-1, patches.shape[-2] * patches.shape[-1])


def points_of(layer: Any, x: np.ndarray) -> np.ndarray:
    """Return `rows_of` as NumPy's."""
    return np.asarray(rows_of(layer, x))


def directions(points: np.ndarray) -> np.ndarray:
    """Return rows of length 1; a row of zeros stays."""
    lengths = np.linalg.norm(points, axis=-1, keepdims=True)
    return points / np.where(lengths, lengths, 1.0)
