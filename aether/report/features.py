"""The section about ⵟ layers as linear models of a finite feature map."""

from aether.errors import InputError
from aether.explain.feature_map import table
from aether.explain.layers import layers_of, seen
from aether.nn import YatNMN
from aether.report.section import Content, Table
from aether.report.subject import Subject

WAVES = (16, 64, 256, 1024)
INPUTS, POINTS = 4, 128


def features(subject: Subject) -> Content:
    """Tell how near a linear model of so many features comes to the first and the last dense ⵟ layer."""
    layers = {name: layer for name, layer in layers_of(subject.model).items() if isinstance(layer, YatNMN)}
    if not layers:
        raise InputError("The network has no dense ⵟ layer, which alone is turned into a linear model of features.")
    given, rows = seen(subject.model, subject.x[:INPUTS]), []
    for name in dict.fromkeys([next(iter(layers)), list(layers)[-1]]):
        x = given[name].x.reshape(-1, given[name].x.shape[-1])[:POINTS]
        for row in table(layers[name], x, WAVES):
            rows.append({"layer": name} | {k: int(v) if k in ("waves", "features") else v for k, v in row.items()})
    text = (
        "Each unit is linear in a finite map of its input, exact in the numerator and a mean over random waves in the "
        "denominator. The error falls as one over the root of their number.",
    )
    caption = "‖ŷ − y‖/‖y‖, the largest error of an output, and what that exceeds with a probability of 1 % at most"
    return text, (Table.of(rows, caption),)
