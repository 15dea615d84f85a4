"""Scores of a language model on a text."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from aether.losses import Loss
from aether.parallel import to_global

Scores = dict[str, float | int | None]


def make_scorer(
    graph: nnx.GraphDef, loss: Loss, token_bytes: np.ndarray, mesh: Mesh
) -> Callable[[Any, Iterable[dict[str, np.ndarray]]], Scores]:
    """Return score(params, batches) -> loss, perplexity, bits_per_byte, accuracy, tokens.

    `loss` is the mean negative log-likelihood in nats a token, `bits_per_byte` the summed nats / ln 2 / bytes of the
    scored text (None where no byte is scored), `accuracy` the share of tokens whose likeliest guess is right.

    Args:
      graph: of the model.
      loss: of `aether.losses.LOSSES`, its options bound.
      token_bytes: bytes of text for each id.
      mesh: where the parameters live.
    """
    lengths = jnp.asarray(token_bytes, jnp.int32)

    @jax.jit
    def sums(params: Any, lengths: jax.Array, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        _, found = loss(nnx.merge(graph, params), batch, None)
        return found | {"bytes": jnp.sum(lengths[batch["tokens"][:, 1:]] * batch["mask"])}

    def score(params: Any, batches: Iterable[dict[str, np.ndarray]]) -> Scores:
        total = dict.fromkeys(("nll", "correct", "weight", "bytes"), 0.0)
        last = None
        for batch in batches:
            with jax.set_mesh(mesh):
                found = sums(params, lengths, to_global(batch, mesh))
            if last is not None:
                _add(total, last)  # one batch late, so that the device never waits for this host
            last = found
        if last is not None:
            _add(total, last)
        return summarise(**total)

    return score


def _add(total: dict[str, float], found: dict[str, jax.Array]) -> None:
    for name, value in jax.device_get(found).items():
        total[name] += float(value)


def summarise(nll: float, correct: float, weight: float, bytes: float) -> Scores:
    """Turn sums over the scored tokens into what is reported."""
    mean = nll / max(weight, 1.0)
    return dict(
        loss=mean,
        perplexity=math.exp(min(mean, 700.0)) if math.isfinite(mean) else math.nan,
        bits_per_byte=nll / math.log(2) / bytes if bytes else None,
        accuracy=correct / max(weight, 1.0),
        tokens=int(weight),
    )


def bound_loss(loss: Loss, chunk: int, z_loss: float = 0.0) -> Loss:
    """Bind a loss's options, so that what remains is loss(model, batch, key)."""
    return partial(loss, chunk=chunk, z_loss=z_loss)
