"""The section that says how much the units can do, at this checkpoint and over training."""

from collections.abc import Iterator

import numpy as np
from flax import nnx

from aether.checkpoint import Checkpoints
from aether.errors import AetherError
from aether.evaluate.inputs import spread
from aether.evaluate.load import load_run
from aether.explain.capacity import capacities, squared_norms
from aether.explain.layers import layers_of
from aether.nn import YatConv, YatNMN
from aether.report.draw import draw_over_training, draw_spectra
from aether.report.section import Content, Item, Picture, Table
from aether.report.subject import Subject
from aether.workdir import Workdir

LIMIT = 512  # centres of a spectrum
CHECKPOINTS = 20  # that are looked at
SAMPLES = 8  # inputs whose places are the samples of the bound


def capacity(subject: Subject) -> Content:
    """Tell norms, spectra and bounds of every layer."""
    found = capacities(subject.model, subject.x[:SAMPLES], LIMIT)
    exact = all(one.exact for one in found.values())
    text = [
        "The squared norm of a unit in the RKHS of its layer's kernel, α² (‖w‖² + |b|)²/ε"
        + (", is" if exact else ": the norm itself where a layer has one b ≥ 0, else an upper bound, is")
        + " how sharply it can turn. The effective rank says how many different things the centres are."
    ]
    rows = [{"layer": name} | one.summary() for name, one in found.items()]
    items: list[Item] = [Table.of(rows, f"Squared norms, and the Gram matrix of at most {LIMIT} centres")]
    bounds = {name: one.bound for name, one in found.items() if one.bound is not None}
    columns = [
        {"layer": name, "bound": b.value, "radius": b.radius, "samples": b.samples} for name, b in bounds.items()
    ]
    items.append(Table.of(columns, "Bound of the empirical Rademacher complexity of all functions of that norm"))
    text.append("The bound assumes that " + "; ".join(next(iter(bounds.values())).assumptions[2:]) + ".")
    spectra = {name: one.eigenvalues for name, one in found.items()}
    items.append(Picture("spectra.png", draw_spectra(spectra), "The spectra of the Gram matrices."))
    return tuple(text), (*items, *_over_training(subject))


def _over_training(subject: Subject) -> Iterator[Item]:
    """Show the mean squared norm of each layer at every checkpoint that is there, if there are several."""
    run = subject.run
    there = sorted(Checkpoints(Workdir(run.workdir, primary=False).checkpoints, run.config.checkpoint).steps())
    rows = []
    for k in subject.progress(spread(len(there), CHECKPOINTS), "checkpoints"):
        try:
            other = load_run(run.workdir, there[k], average="none")
        except AetherError as e:  # damaged, or gone meanwhile
            subject.say(f"  step {there[k]} is left out: {e}")
            continue
        layers = layers_of(nnx.merge(other.graph, other.params)).items()
        norms = {n: float(np.mean(squared_norms(one))) for n, one in layers if isinstance(one, YatNMN | YatConv)}
        rows.append({"step": there[k]} | norms)
    if len(rows) < 2:
        return
    caption = "The mean squared norm of each layer's units at the checkpoints kept"
    yield Table.of(rows, caption)
    lines = {name: [float(row[name]) for row in rows] for name in rows[0] if name != "step"}
    png = draw_over_training([int(row["step"]) for row in rows], lines, "mean squared norm")
    yield Picture("capacity_training.png", png, f"{caption}.")
