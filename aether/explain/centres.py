"""Centres for new units of a trained network: what its hidden layers are given, drawn from data."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aether.errors import InputError
from aether.explain.layers import layers_of, watching
from aether.explain.points import points_of
from aether.explain.surgery import places_of
from aether.nn.prototypes import draw_prototypes

_CHOICE = 4  # inputs to choose from, for each centre


def drawn(
    model: Any, batches: Iterable[np.ndarray], counts: Mapping[str, int], *, noise: float = 0.0, seed: int = 0
) -> dict[str, np.ndarray]:
    """Return centres (count, d) for hidden ⵟ layers, spread over what these are given, by k-means++ seeding.

    They become as long as the layer's own, the median of those: a unit that lies on its input responds there with
    α (‖x‖² + b)²/ε, thousands of times as strongly as trained ones, and in a spherical layer, whose outputs know no
    lengths, one much longer or shorter would turn slower or faster than they.

    Args:
      model: the network.
      batches: of its inputs; of each, as many points are kept, at random.
      counts: by layer, as in `aether.explain.surgery.places_of`.
      noise: see `draw_prototypes`.
      seed: of the choice.

    Raises:
      InputError: fewer points than centres, or a layer that there is not.
    """
    if unknown := [name for name in counts if name not in places_of(model)]:
        raise InputError(f"There is no hidden ⵟ layer {unknown[0]!r}; there are {', '.join(places_of(model))}.")
    rng, layers = np.random.default_rng(seed), layers_of(model)
    found: dict[str, list[np.ndarray]] = {name: [] for name in counts}
    watch = watching(model)
    for x in batches:
        given = watch(x)
        for name, count in counts.items():
            points = points_of(layers[name], given[name].x)
            few = rng.choice(len(points), min(len(points), _CHOICE * count), replace=False)
            found[name].append(points[few])
    return {
        name: _centres(name, layers[name], np.concatenate(found[name]), count, noise, seed + k)
        for k, (name, count) in enumerate(counts.items())
    }


def _centres(name: str, layer: Any, points: np.ndarray, count: int, noise: float, seed: int) -> np.ndarray:
    if len(points) < count:
        raise InputError(f"{name} has {len(points)} inputs and {count} centres are to be drawn; give more data.")
    new = np.asarray(draw_prototypes(jnp.asarray(points), count, jax.random.key(seed), noise=noise))
    kernel = np.asarray(layer.raw_kernel()).reshape(new.shape[1], -1)
    lengths = np.linalg.norm(new, axis=-1, keepdims=True)
    return new / np.where(lengths, lengths, 1.0) * np.median(np.linalg.norm(kernel, axis=0))
