"""The section that says what made the network's guesses."""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from aether.explain.attribution import Attribution, attribute
from aether.report.draw import draw_image_shares, draw_layer_shares
from aether.report.section import Content, Item, Passage, Picture, Table
from aether.report.subject import Subject, Text

SHOWN = 8


def attribution(subject: Subject) -> Content:
    """Take one logit of each input apart: of texts that of what follows, of images that of the class."""
    found = list(_images(subject) if subject.images else _texts(subject))
    error = max(abs(sum(a.layers.values()) - a.logit) / sum(map(abs, a.layers.values())) for a in found)
    text = (
        "A logit is the sum of what each layer put into the residual stream, and a layer's share is the sum over its "
        "units, or over the places that it read from. Blue speaks for the answer, red against it.",
        f"Over {len(found)} inputs the shares add up to the logit within {error:.1e} of their absolute sum.",
    )
    return text, (*_shown(subject, found), *_overall(found))


def _texts(subject: Subject) -> Iterator[Attribution]:
    for text in subject.progress(subject.texts, "texts"):
        yield attribute(subject.model, text.ids, text.target, text.position)


def _images(subject: Subject) -> Iterator[Attribution]:
    pairs = list(zip(subject.x, subject.labels, strict=True))
    for x, label in subject.progress(pairs, "images"):
        yield attribute(subject.model, x, int(label))


def _shown(subject: Subject, found: list[Attribution]) -> Iterator[Item]:
    """Show the first inputs one by one."""
    if subject.images:
        assert subject.run.labels is not None
        names = [subject.run.labels.names[label] for label in subject.labels[:SHOWN]]
        png = draw_image_shares(subject.pictures[:SHOWN], names, found[:SHOWN])
        caption = (
            "For each image the share of every place in the logit of its class, summed over the layers, the shares of "
            "the layers, and the units with the largest ones."
        )
        yield Picture("attribution_images.png", png, caption)
        return
    for text, one in list(zip(subject.texts, found, strict=True))[:SHOWN]:
        yield _passage(subject, text, one)


def _passage(subject: Subject, text: Text, found: Attribution) -> Passage:
    shares = np.zeros(len(text.ids))
    for sources in found.sources.values():
        shares += sources.sum(0)[: len(shares)]
    hidden = subject.run.config.model.task == "mlm"
    what = subject.words([text.target])
    where = f"what is hidden at {text.position}" if hidden else "what comes next"
    units = ", ".join(f"{layer} unit {unit} {share:+.2f}" for layer, unit, share in found.top_units(5))
    layers = sorted(found.layers.items(), key=lambda item: -abs(item[1]))[:5]
    return Passage(
        tuple(subject.pieces(text.ids, shares.tolist())),
        f"The tokens that attention read for the logit {found.logit:.2f} of “{what}”, {where}",
        (
            f"units: {units or 'none'}",
            "layers: " + ", ".join(f"{name} {share:+.2f}" for name, share in layers),
        ),
    )


def _overall(found: list[Attribution]) -> Iterator[Item]:
    """Sum the layers and units up over all inputs."""
    layers = {name: np.array([a.layers[name] for a in found]) for name in found[0].layers}
    yield Picture("attribution_layers.png", draw_layer_shares(layers), f"The layers' shares over {len(found)} inputs.")
    counts = Counter((layer, unit) for a in found for layer, unit, _ in a.top_units(5))
    shares = {key: [a.units[key[0]][key[1]] for a in found] for key, _ in counts.most_common(15)}
    rows = [
        {
            "layer": layer,
            "unit": unit,
            "inputs": counts[layer, unit],
            "mean share": float(np.mean(values)),
            "largest": float(max(values, key=abs)),
        }
        for (layer, unit), values in shares.items()
    ]
    if rows:
        yield Table.of(rows, "Units that are most often among the five largest shares of an input")
