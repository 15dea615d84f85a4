"""Scores of a model on a text or on images: sums on the devices, batch by batch, and what is reported of them."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from aether.config import Config
from aether.data.tokenizers import Tokenizer
from aether.evaluate.images import image_sums, summarise_images
from aether.losses import loss_of
from aether.parallel import to_global

Scores = dict[str, float | int | None]
Sums = dict[str, Any]
Look = Callable[[dict[str, np.ndarray], dict[str, np.ndarray]], None]
Score = Callable[[Any, Iterable[dict[str, np.ndarray]]], Scores]


def scorer_of(config: Config, tokenizer: Tokenizer | None, graph: nnx.GraphDef, mesh: Mesh) -> Score:
    """Return score(variables, batches) -> what a resolved config's task reports.

    Of language models: `loss`, the mean negative log-likelihood in nats a token, `perplexity`, `bits_per_byte`, the
    summed nats / ln 2 / bytes of the scored text (None where no byte is scored), `accuracy`, the share of tokens whose
    likeliest guess is right, `tokens`. Of masked ones the same over the masked tokens, without `bits_per_byte`. Of
    classifiers: see `aether.evaluate.images`.

    Args:
      config: resolved.
      tokenizer: of texts.
      graph: of the model.
      mesh: where the parameters live.
    """
    if config.model.task == "classify":
        sums = summer(graph, image_sums(config), mesh)
        return lambda variables, batches: summarise_images(sums(variables, batches))
    loss = loss_of(config)
    if config.model.task == "mlm":
        sums = summer(graph, lambda model, batch: loss(model, batch, None)[1], mesh)
        return lambda variables, batches: summarise(sums(variables, batches))
    assert tokenizer is not None
    lengths = jnp.asarray(tokenizer.token_bytes, jnp.int32)

    def with_bytes(model: nnx.Module, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        _, found = loss(model, batch, None)
        return found | {"bytes": jnp.sum(lengths[batch["tokens"][:, 1:]] * batch["mask"])}

    sums = summer(graph, with_bytes, mesh)
    return lambda variables, batches: summarise(sums(variables, batches))


def summer(
    graph: nnx.GraphDef,
    of_batch: Callable[[Any, dict[str, jax.Array]], dict[str, Any]],
    mesh: Mesh,
    look: Look | None = None,
) -> Callable[[Any, Iterable[dict[str, np.ndarray]]], Sums]:
    """Return sums(variables, batches): what `of_batch(model, batch)` returns, added up in float64; {} of no batch.

    With `look`, what it returns as `rows` is no sum: look(batch, rows) sees it, batch by batch.
    """

    @jax.jit
    def one(variables: Any, batch: dict[str, jax.Array]) -> dict[str, Any]:
        return of_batch(nnx.merge(graph, variables), batch)

    def add(total: Sums, batch: dict[str, np.ndarray], found: dict[str, Any]) -> None:
        found = jax.device_get(found)
        if look is not None:
            look(batch, found.pop("rows"))
        for name, value in found.items():
            total[name] = total.get(name, 0.0) + np.asarray(value, np.float64)

    def sums(variables: Any, batches: Iterable[dict[str, np.ndarray]]) -> Sums:
        total: Sums = {}
        last = None
        for batch in batches:
            with jax.set_mesh(mesh):
                found = one(variables, to_global(batch, mesh))
            if last is not None:
                add(total, *last)  # one batch late, so that the device never waits for this host
            last = batch, found
        if last is not None:
            add(total, *last)
        return total

    return sums


def summarise(sums: Sums) -> Scores:
    """Turn sums over the scored tokens into what is reported."""
    nll, correct, weight = (float(sums.get(name, 0.0)) for name in ("nll", "correct", "weight"))
    mean = nll / max(weight, 1.0)
    scores: Scores = dict(
        loss=mean, perplexity=math.exp(min(mean, 700.0)) if math.isfinite(mean) else math.nan, bits_per_byte=None
    )
    if "bytes" in sums:
        scores["bits_per_byte"] = nll / math.log(2) / float(sums["bytes"]) if sums["bytes"] else None
    return scores | dict(accuracy=correct / max(weight, 1.0), tokens=int(weight))
