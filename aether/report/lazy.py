"""The section about a network that evaluates only the prototypes nearest to its inputs."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from aether.evaluate.metrics import scorer_of
from aether.explain.layers import blocks_of, seen
from aether.explain.lazy import errors, scores
from aether.nn import YatMLP
from aether.report.section import Content, Table
from aether.report.subject import Subject

SHARES = (1.0, 0.5, 0.25, 0.1, 0.05, 0.01)
INPUTS, ROWS = 8, 512  # inputs that are scored, in batches of as many; rows of a layer's input


def lazy(subject: Subject) -> Content:
    """Tell what a smaller share of the units costs in the scores, and each layer in error, with its bound."""
    run, (_, examples) = subject.run, subject.examples
    chosen = np.linspace(0, len(examples) - 1, min(len(examples), subject.asked.inputs)).round().astype(int)
    rows = [examples[int(i)] for i in chosen]
    size = min(INPUTS, len(rows))
    batches = [
        {key: np.stack([row[key] for row in rows[k : k + size]]) for key in rows[0]}
        for k in range(0, len(rows) - size + 1, size)
    ]

    def score(model: Any) -> dict[str, float]:
        graph, params = nnx.split(model)
        found = scorer_of(run.config, run.tokenizer, graph, run.mesh)(params, subject.progress(batches, "batches"))
        return {key: value for key, value in found.items() if value is not None and key in ("loss", "accuracy")}

    whole = scores(subject.model, SHARES, score)
    given = seen(subject.model, subject.x[:size])
    table = []
    for name, block in blocks_of(subject.model).items():
        if isinstance(getattr(block, "mlp", None), YatMLP):
            x = jnp.asarray(given[f"{name}.mlp.hidden"].x)
            flat = x.reshape(-1, x.shape[-1])[:ROWS]
            units = block.mlp.hidden.kernel_shape[1]
            for row in errors(block.mlp, flat, [max(1, round(share * units)) for share in SHARES[1:]]):
                table.append({"layer": name} | row)
    text = (
        "A response falls with the distance, so that near prototypes make most of a layer. Here only the k nearest of "
        "each ⵟ-MLP are evaluated, by exact search; what the others could add at most is known without a look at them.",
    )
    count = len(batches) * size
    items = (
        Table.of(whole, f"Scores of {count} inputs as the share of units falls"),
        Table.of(table, "Error of each layer's output, and its guaranteed bound, relative to the output"),
    )
    return text, items
