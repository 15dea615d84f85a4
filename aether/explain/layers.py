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
PARTS = (*_RECORDED, MLP, *BLOCKS)


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
    run = observing(model, lambda layer, x, y: (x, y), kinds=_RECORDED)

    def watch(x: np.ndarray) -> dict[str, Seen]:
        looked, _ = run(x)
        return {name: Seen(layer, *looked[name]) for name, layer in layers.items()}

    return watch


def observing(
    model: Any,
    look: Callable[[Any, Array, Array], Any],
    end: Callable[[Any, Array, Any], Any] = lambda *_: None,
    kinds: tuple[type, ...] = PARTS,
) -> Callable[[np.ndarray], tuple[dict[str, Any], Any]]:
    """Return a function of a network's input, one program with the forward pass, compiled once for each shape.

    It returns what look(part, its input, its output) makes of each part of these kinds by name, and end(model, x, y) of
    the network's input and output. All of that are pytrees of arrays.
    """
    graph, state = nnx.split(model)

    @jax.jit
    def run(state: nnx.State, x: Array) -> tuple[dict[str, Any], Any]:
        network, ends = nnx.merge(graph, state), []
        note = lambda part, x, y, _: look(part, x, y)  # noqa: E731
        looked = noted(network, lambda model: ends.append(model(x)), note, kinds)
        return looked, end(network, x, ends[0])

    def observe(x: np.ndarray) -> tuple[dict[str, Any], Any]:
        with jax.default_matmul_precision("highest"):
            looked, ended = jax.device_get(run(state, jnp.asarray(x)))
        return {name: looked[name] for name in parts_of(model, kinds)}, ended

    return observe


class Noted(nnx.BatchStat):
    """What is noted of a part's call: it leaves a loop over blocks as BatchNorm's statistics do."""


Note = Callable[[Any, Array, Array, dict[str, Any]], Any]


def parts_of(model: Any, kinds: tuple[type, ...] = PARTS) -> dict[str, Any]:
    """Return what can be noted of a network, if it is of these kinds, by name.

    Its ⵟ layers, each `MLP` of a baseline under the name that its hidden layer has in a ⵟ network, and its blocks.
    """
    blocks = blocks_of(model)
    usual = {f"{name}.mlp.hidden": block.mlp for name, block in blocks.items() if hasattr(block, "mlp")}
    parts = layers_of(model) | {name: mlp for name, mlp in usual.items() if isinstance(mlp, MLP)} | blocks
    return {name: part for name, part in parts.items() if isinstance(part, kinds)}


def noted(model: Any, run: Callable[[Any], Any], note: Note, kinds: tuple[type, ...] = _RECORDED) -> dict[str, Any]:
    """Return what note(part, x, y, keywords), arrays or a tree of them, makes of the call of each part, by name.

    To be traced; stacked blocks stay a loop, whatever their number.

    Args:
      model: the network, which stays as it is.
      run: makes one forward pass of the copy of the network that it is given.
      note: is given what the part was called with and what it returned. A `YatMLP` is its `hidden` layer here, and of
        an `MLP` what it returned are its hidden units after GELU.
      kinds: of the parts, see `parts_of`; its ⵟ layers by default.
    """
    model = nnx.merge(*nnx.split(model), copy=True)
    with _calling(note, kinds):
        run(model)
    return {name: part.noted.get_value() for name, part in parts_of(model, kinds).items()}


@contextmanager
def _calling(note: Note, kinds: tuple[type, ...]) -> Iterator[None]:
    """Have parts of these kinds note each call."""
    if YatNMN in kinds:  # which in a `YatMLP` is not called: its gradient is one with the linear map's
        kinds = (*kinds, YatMLP)

    def noting(kind: type, call: Callable) -> Callable:
        def called(self: Any, x: Array, *args: Any, **kwargs: Any) -> Any:
            y = call(self, x, *args, **kwargs)
            if isinstance(self, YatMLP):
                hidden = self.hidden
                hidden.noted = Noted(note(hidden, x, calls[YatNMN](hidden, x), kwargs))  # type: ignore[attr-defined]
            elif isinstance(self, MLP):
                self.noted = Noted(note(self, x, jax.nn.gelu(self.hidden(x)), kwargs))  # type: ignore[attr-defined]
            else:
                self.noted = Noted(note(self, x, y[0] if isinstance(y, tuple) else y, kwargs))
            return y

        return called

    with wrapped(kinds, noting) as calls:
        yield


@contextmanager
def wrapped(kinds: tuple[type, ...], wrap: Callable[[type, Callable], Callable]) -> Iterator[dict[type, Callable]]:
    """Have the calls of these classes be wrap(class, call), and afterwards what they were, which is yielded."""
    calls: dict[type, Callable] = {kind: kind.__call__ for kind in kinds}
    own = [kind for kind in kinds if "__call__" in vars(kind)]
    try:
        for kind, call in calls.items():
            kind.__call__ = wrap(kind, call)  # type: ignore[method-assign]
        yield calls
    finally:
        for kind, call in calls.items():
            if kind in own:
                kind.__call__ = call  # type: ignore[method-assign]
            else:
                del kind.__call__  # which it inherits
