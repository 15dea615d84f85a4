"""The ⵟ layers of a network one by one, and what each is given and makes of it in a forward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from aether.errors import InputError
from aether.models import resnet
from aether.models.block import MLP, Block
from aether.models.resnet import ResNet
from aether.nn import YatAttention, YatConv2D, YatLinearAttention, YatMLP, YatNMN

_RECORDED = (YatNMN, YatConv2D, YatMLP, YatAttention, YatLinearAttention)
BLOCKS = (Block, resnet.Block, resnet.YatBlock)


class Seen(NamedTuple):
    """A layer of a network, what it was given in a forward pass, and what it made of that."""

    layer: Any
    x: np.ndarray
    y: np.ndarray


def blocks_of(model: Any) -> dict[str, Any]:
    """Return the residual blocks of a network by name, `blocks.3` or `stages.0.1`, in the order of the forward pass."""
    if not isinstance(model, ResNet):
        return dict(_unstacked(model.blocks, "blocks", 0, model.config.layers))
    found: dict[str, Any] = {}
    for s, stage in enumerate(model.stages):
        found |= {f"stages.{s}.0": stage.first}
        if stage.rest is not None:
            found |= dict(_unstacked(stage.rest, f"stages.{s}", 1, stage.length))
    return found


def _unstacked(blocks: nnx.Module, prefix: str, first: int, count: int) -> Iterator[tuple[str, Any]]:
    graph, state = nnx.split(blocks)
    for k in range(count):
        yield f"{prefix}.{first + k}", nnx.merge(graph, jax.tree.map(lambda a, k=k: a[k], state))


def layers_of(model: Any) -> dict[str, Any]:
    """Return the ⵟ layers by name, as `blocks.0.attention`, `stages.0.1.hidden`, `head`, in that order."""
    found: dict[str, Any] = {}
    for name, block in blocks_of(model).items():
        if isinstance(model, ResNet):
            found[f"{name}.hidden"] = block.hidden
        else:
            found |= {f"{name}.attention": block.attention, f"{name}.mlp.hidden": block.mlp.hidden}
    found["head"] = getattr(model, "head", None)
    return {name: layer for name, layer in found.items() if isinstance(layer, _RECORDED)}


def layer_of(model: Any, name: str, kinds: type | tuple[type, ...] = _RECORDED) -> Any:
    """Return one of them.

    Raises:
      InputError: there is none of that name and kind; the message lists those that there are.
    """
    found = {key: layer for key, layer in layers_of(model).items() if isinstance(layer, kinds)}
    if name in found:
        return found[name]
    there = ", ".join(found) or "none: the network has no ⵟ units there"
    raise InputError(f"There is no ⵟ layer {name!r} that this can be done with; there are {there}.")


def seen(model: Any, x: np.ndarray) -> dict[str, Seen]:
    """Run a network on ids (b, t) or images (b, s, s, c) and return its ⵟ layers, each with its input and output."""
    return watching(model)(x)


def watching(model: Any) -> Callable[[np.ndarray], dict[str, Seen]]:
    """Return `seen` of a network as a function of its input, compiled once for batches of one shape."""
    layers = layers_of(model)
    run = observing(model, lambda layer, x, y: (x, y) if isinstance(layer, _RECORDED) else None)

    def watch(x: np.ndarray) -> dict[str, Seen]:
        return {name: Seen(layers[name], *pair) for name, pair in run(x)[0].items() if name in layers}

    return watch


def observing(
    model: Any, look: Callable[[Any, Array, Array], Any], end: Callable[[Any, Array, Any], Any] = lambda *_: None
) -> Callable[[np.ndarray], tuple[dict[str, Any], Any]]:
    """Return a function of a network's input, one program with the forward pass, compiled once for each shape.

    It returns what look(part, its input, its output) makes of each ⵟ layer, of each `MLP` of a baseline, whose output
    are then its hidden units after GELU, and of each residual block, by name; and end(model, x, y) of the network's
    input and output. All of that are pytrees of arrays.
    """
    blocks = blocks_of(model)
    usual = [f"{name}.mlp.hidden" for name, part in blocks.items() if isinstance(getattr(part, "mlp", None), MLP)]
    names = [*layers_of(model), *usual, *blocks]
    graph, state = nnx.split(model)

    @jax.jit
    def run(state: nnx.State, x: Array) -> tuple[list[Any], Any]:
        network = nnx.merge(graph, state)
        with jax.disable_jit(), _recorded() as found:  # so that the loop over blocks is one of Python's
            y = network(x)
        found.sort(key=lambda call: 2 if isinstance(call[0], BLOCKS) else isinstance(call[0], MLP))
        return [look(*call) for call in found], end(network, x, y)

    def observe(x: np.ndarray) -> tuple[dict[str, Any], Any]:
        with jax.default_matmul_precision("highest"):
            looked, ended = jax.device_get(run(state, jnp.asarray(x)))
        return dict(zip(names, looked, strict=True)), ended

    return observe


@contextmanager
def _recorded() -> Iterator[list[tuple]]:
    """Note ⵟ layers, MLPs and blocks, what they are called with and return, in the order of the calls."""
    found: list[tuple] = []
    calls: dict[type, Callable] = {kind: kind.__call__ for kind in (*_RECORDED, MLP, *BLOCKS)}

    def noting(call: Callable) -> Callable:
        def noted(self: Any, x: jax.Array, *args: Any, **kwargs: Any) -> Any:
            y = call(self, x, *args, **kwargs)
            if isinstance(self, YatMLP):  # which is a layer with the linear map behind it
                found.append((self.hidden, x, calls[YatNMN](self.hidden, x)))
            elif isinstance(self, MLP):
                found.append((self, x, jax.nn.gelu(self.hidden(x))))
            else:
                found.append((self, x, y[0] if isinstance(y, tuple) else y))
            return y

        return noted

    for kind in calls:
        kind.__call__ = noting(calls[kind])  # type: ignore[method-assign]
    try:
        yield found
    finally:
        for kind in calls:
            kind.__call__ = calls[kind]  # type: ignore[method-assign]
