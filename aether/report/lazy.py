"""The section about a network that evaluates only the prototypes nearest to its inputs."""

import math
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from flax import nnx

from aether.data.examples import Batch
from aether.data.loader import evaluation_batches
from aether.evaluate.metrics import scorer_of
from aether.evaluate.run import rows_of
from aether.explain.layers import blocks_of, seen
from aether.explain.lazy import errors, scores
from aether.nn import YatMLP
from aether.report.section import Content, Table
from aether.report.subject import Subject

SHARES = (1.0, 0.5, 0.1, 0.01)
SCORED = 1024  # tokens, in a network of 124m
INPUTS, ROWS = 4, 64  # inputs whose rows each layer's error is measured on, and how many of these


def lazy(subject: Subject) -> Content:
    """Tell what a smaller share of the units costs in the scores, and each layer in error, with its bound."""
    run, batches = subject.run, _batches(subject)

    def score(model: Any) -> dict[str, float]:
        graph, params = nnx.split(model)
        found = scorer_of(run.config, run.tokenizer, graph, run.mesh)(params, subject.progress(batches, "batches"))
        return {key: value for key, value in found.items() if value is not None and key in ("loss", "accuracy")}

    whole = scores(subject.model, SHARES, score)
    given = seen(subject.model, subject.x[:INPUTS])
    table = []
    for name, block in blocks_of(subject.model).items():
        if isinstance(getattr(block, "mlp", None), YatMLP):
            x = jnp.asarray(given[f"{name}.mlp.hidden"].x)
            flat = x.reshape(-1, x.shape[-1])[:ROWS]
            units = block.mlp.hidden.kernel_shape[1]
            for row in errors(block.mlp, flat, [math.ceil(share * units) for share in SHARES[1:]]):
                table.append({"layer": name} | row)
    text = (
        "A response falls with the distance, so that near prototypes make most of a layer. Here only the k nearest of "
        "each ⵟ-MLP are evaluated, by exact search; what the others could add at most is known without a look at them.",
    )
    count = int(sum(batch["mask"].any(tuple(range(1, batch["mask"].ndim))).sum() for batch in batches))
    items = (
        Table.of(whole, f"Scores of {count} inputs as the share of units falls"),
        Table.of(table, "Error of each layer's output, and its guaranteed bound, relative to the output"),
    )
    return text, items


def _batches(subject: Subject) -> list[Batch]:
    """Return as many inputs as were asked for and `SCORED` allows, texts cut to their length."""
    (_, examples), c = subject.examples, subject.run.config.data
    wanted = min(subject.few(SCORED), len(examples))
    size = rows_of(subject.run, min(wanted, c.batch_size))
    batches = evaluation_batches(examples, replace(c, batch_size=size), math.ceil(wanted / size))
    if subject.images:
        return list(batches)
    return [{key: a[:, : subject.length + a.shape[1] - c.context] for key, a in batch.items()} for batch in batches]
