"""Tiny configs, models, batches and texts that tests share."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params

from aether.config import Config, build
from aether.models import describe_model, make_model

VOCAB = 32


def tiny_config(kind: str = "aether", **overrides: Any) -> Config:
    """Return a resolved config of two layers of width 16; `overrides` are sections, as in `train=dict(steps=3)`."""
    values: dict[str, dict[str, Any]] = dict(
        model=dict(kind=kind, layers=2, heads=4, width=16, dtype="float32"),
        data=dict(context=8, batch_size=8),
        optim=dict(learning_rate=1e-2, warmup_steps=2),
        train=dict(steps=60, loss_chunk=4),
    )
    for section, content in overrides.items():
        values[section] = {**values.get(section, {}), **content}
    return build(values).resolved(VOCAB)


def tiny_model(config: Config) -> nnx.Module:
    """Make the model of a resolved config from its seed, compiled as one function: much faster than op by op."""

    def make() -> nnx.Module:
        return make_model(config, nnx.Rngs(config.train.seed))

    graph = nnx.graphdef(nnx.eval_shape(make))
    return nnx.merge(graph, jax.jit(lambda: nnx.state(make()))())


def drawn_model(config: Config) -> nnx.Module:
    """Make the model of a resolved config with parameters from N(0, 1/9): nothing to compile, and no zeros."""
    rng = np.random.default_rng(config.train.seed)

    def draw(shape: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape.shape) / 3, shape.dtype)

    graph, *shapes = describe_model(config)
    return nnx.merge(graph, *jax.tree.map(draw, shapes))


def tiny_batch(config: Config, step: int = 0) -> dict[str, np.ndarray]:
    """Make a batch from a noisy cycle of ids, packed as two documents a row, with ragged masks."""
    c = config.data
    rng = np.random.default_rng([config.train.seed, step])
    columns = np.arange(c.context + 1)
    noise = rng.integers(0, 3, (c.batch_size, c.context + 1))
    tokens = (rng.integers(0, VOCAB, (c.batch_size, 1)) + 5 * columns + noise) % VOCAB
    starts = rng.integers(2, c.context, (c.batch_size, 1))
    segments = 1 + (columns >= starts)
    positions = np.where(segments == 1, columns, columns - starts)
    mask = (segments[:, 1:] == segments[:, :-1]) & (columns[1:] <= rng.integers(starts, c.context + 1))
    arrays = dict(tokens=tokens, segments=segments, positions=positions, mask=mask)
    return {k: v.astype(np.int32) for k, v in arrays.items()}


def tiny_text(folder: Path, words: int = 2000) -> Path:
    """Write a file of plain words that a model can learn something of; return its path."""
    vocabulary = "the model reads a line and says what comes next if it can".split()
    rng = np.random.default_rng(0)
    path = folder / "tiny.txt"
    lines = (" ".join(rng.choice(vocabulary, 10)) + ".\n" for _ in range(math.ceil(words / 10)))
    path.write_text("".join(lines), encoding="utf-8")
    return path


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """Yield every equation of a jaxpr, those of its inner jaxprs too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)
