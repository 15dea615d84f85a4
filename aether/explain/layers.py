"""The ⵟ layers of a network one by one, and what each is given and makes of it in a forward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aether.errors import InputError
from aether.models.resnet import ResNet
from aether.nn import YatAttention, YatConv2D, YatLinearAttention, YatMLP, YatNMN

_RECORDED = (YatNMN, YatConv2D, YatMLP, YatAttention, YatLinearAttention)


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
    graph, state = nnx.split(model)

    @jax.jit
    def run(state: nnx.State, x: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
        return noted(nnx.merge(graph, state), lambda model: model(x), lambda layer, x, y, how: (x, y))

    def watch(x: np.ndarray) -> dict[str, Seen]:
        with jax.default_matmul_precision("highest"):
            arrays = jax.device_get(run(state, jnp.asarray(x)))
        return {name: Seen(layer, *arrays[name]) for name, layer in layers.items()}

    return watch


class Noted(nnx.BatchStat):
    """What is noted of a layer's call: it leaves a loop over blocks as BatchNorm's statistics do."""


Note = Callable[[Any, jax.Array, jax.Array, dict[str, Any]], Any]


def noted(model: Any, run: Callable[[Any], Any], note: Note) -> dict[str, Any]:
    """Return what note(layer, x, y, keywords), arrays or a tree of them, makes of each ⵟ layer's call, by name.

    To be traced; stacked blocks stay a loop, whatever their number.

    Args:
      model: the network, which stays as it is.
      run: makes one forward pass of the copy of the network that it is given.
      note: is given what the layer was called with and what it returned. A `YatMLP` is its `hidden` layer here.
    """
    model = nnx.merge(*nnx.split(model), copy=True)
    with _calling(note):
        run(model)
    return {name: layer.noted.get_value() for name, layer in layers_of(model).items()}


@contextmanager
def _calling(note: Note) -> Iterator[None]:
    """Have ⵟ layers note each call."""
    calls: dict[type, Callable] = {kind: kind.__call__ for kind in _RECORDED}

    def noting(call: Callable) -> Callable:
        def called(self: Any, x: jax.Array, *args: Any, **kwargs: Any) -> Any:
            y = call(self, x, *args, **kwargs)
            if isinstance(self, YatMLP):  # which is a layer with the linear map behind it
                own = Noted(note(self.hidden, x, calls[YatNMN](self.hidden, x), kwargs))
                self.hidden.noted = own  # type: ignore[attr-defined]
            else:
                self.noted = Noted(note(self, x, y[0] if isinstance(y, tuple) else y, kwargs))
            return y

        return called

    for kind in _RECORDED:
        kind.__call__ = noting(calls[kind])  # type: ignore[method-assign]
    try:
        yield
    finally:
        for kind in _RECORDED:
            kind.__call__ = calls[kind]  # type: ignore[method-assign]
