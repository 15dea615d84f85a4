"""The sections about prototypes: the first layer as pictures, and what comes nearest to the units of any layer."""

import math
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import numpy as np
from flax import nnx

from aether.evaluate.load import Run, load_run
from aether.explain.duplicates import close_pairs
from aether.explain.layers import layer_of, layers_of
from aether.explain.points import centres_of
from aether.explain.prototypes import KINDS, first_layer
from aether.explain.survey import Found, Surveyed, survey
from aether.nn import YatConv
from aether.report.draw import draw_kernels, draw_nearest
from aether.report.section import Content, Item, Picture, Table
from aether.report.subject import Subject

NEAREST = 6  # inputs shown of a unit
UNITS = 6  # shown of a layer, unless some are asked for
LAYERS = 4
CONTEXT = 24  # tokens
TOKENS = 8192  # that are searched, in a network of 124m
SAME = 1e-3  # distance of equal prototypes, relative to their length


def first(subject: Subject) -> Content:
    """Show the first layer of a network that reads images, of another run beside it if one is asked for."""
    pictures = [(_name(subject.run), first_layer(subject.model))]
    if subject.asked.baseline:
        other = load_run(subject.asked.baseline, flag="baseline")
        pictures.append((_name(other), first_layer(nnx.merge(other.graph, other.params))))
    text = "The weights of each unit of the first layer as a picture; grey is 0, each unit scaled on its own."
    return (text,), (Picture("first_layer.png", draw_kernels(pictures)),)


def _name(run: Run) -> str:
    return f"{PurePath(run.workdir).name} ({run.config.model.kind})"


def prototypes(subject: Subject) -> Content:
    """Tell of every layer with prototypes which units there are, and of some units what comes nearest to them."""
    x = subject.some(subject.few(TOKENS))
    found = survey(subject.model, subject.batches(x), NEAREST, names=subject.asked.layers, length=CONTEXT)
    layers = layers_of(subject.model)
    rows = [_row(name, layers[name], one) for name, one in found.items()]
    text = (
        "A unit's weights are a point in the space of its inputs. It responds most to inputs near that point and along "
        f"it. Distances are as the layer compares, over {len(x)} inputs.",
    )
    items: list[Item] = [Table.of(rows, "Layers with prototypes")]
    for name in subject.asked.layers or _some(list(found)):
        units = np.array(subject.asked.units or np.argsort(-found[name].responses.largest)[:UNITS])
        items += (_pictures if subject.images else _contexts)(subject, name, found[name].nearest, units)
    return text, tuple(items)


def _row(name: str, layer: Any, found: Surveyed) -> dict[str, Any]:
    unit = {key: np.asarray(value, np.float64) for key, value in layer.unit().items()}
    nearest = found.nearest.values[:, 0]
    return {
        "layer": name,
        "units": len(nearest),
        "α": float(unit["alpha"].mean()),
        "ε": float(unit["epsilon"].mean()),
        "b": float(unit["bias"].mean()),
        "distance to the nearest input: median": float(np.median(nearest)),
        "largest": float(nearest.max()),
        "silent units": len(found.responses.units),
        "equal pairs": len(close_pairs(centres_of(layer), SAME)),
    }


def _some(names: list[str]) -> list[str]:
    """Return a few, evenly spaced over the depth."""
    if len(names) <= LAYERS:
        return names
    return [names[i] for i in np.linspace(0, len(names) - 1, LAYERS).round().astype(int)]


def _contexts(subject: Subject, name: str, found: Found, units: np.ndarray) -> Iterator[Item]:
    assert found.contexts is not None
    rows = []
    for unit in units:
        for context, value in zip(found.contexts[unit][:3], found.values[unit], strict=False):
            words = subject.words(context[context >= 0])
            rows.append({"unit": str(unit), "text up to the token that comes near": words, "distance": float(value)})
    yield Table.of(rows, f"{name}: the nearest contexts of the units that respond most strongly")


def _pictures(subject: Subject, name: str, found: Found, units: np.ndarray) -> Iterator[Item]:
    layer, side = layer_of(subject.model, name, KINDS), subject.pictures.shape[1]
    across = math.isqrt(found.among)
    whole = found.among - across**2  # a class token, which stands for the whole image
    rows, columns = np.divmod(found.places[units] - whole, across)
    pixel = side / across
    centres = (np.stack([rows, columns], -1) + 0.5) * pixel - 0.5
    patch = layer.kernel_shape[0] / layer.strides[0] if isinstance(layer, YatConv) else 1.0
    sizes = np.full(rows.shape, patch * pixel)
    token = found.places[units] < whole
    centres[token], sizes[token] = (side - 1) / 2, side
    labels = [f"unit {unit}" for unit in units]
    png = draw_nearest(subject.pictures, found.rows[units], centres, sizes, labels)
    caption = f"{name}: the images and places that come nearest to units. The mark is the patch of the layer's input."
    yield Picture(f"nearest_{name}.png", png, caption)
