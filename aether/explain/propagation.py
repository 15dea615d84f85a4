"""How signals and gradients pass through a network: their scales at each block, at the start or after training.

Of block l with input x, output y and the loss L summed over a batch, in float32:

- `stream`: root mean square of the entries of x;
- `added`: that of y − x, where both have one shape; of a transformer also `attention` and `mlp`, of what each adds;
- `gradient`: that of ∂L/∂y;
- `entropy`: of the attention weights of evenly spaced queries, over log n of the n positions that each sees, mean over
  heads, rows and queries, as if a row were one document: 1 is uniform. Linear attention, which never has weights, has
  none.

And of every parameter, by layer where blocks are stacked, `value` and `gradient`: root mean squares of its entries and
of those of ∂L/∂p.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from aether.explain.layers import BLOCKS, Noted, blocks_of, wrapped
from aether.losses import Loss
from aether.models.block import MLP, Block
from aether.models.resnet import ResNet
from aether.nn import Attention, YatLinearAttention, YatMLP

QUERIES = 32  # of a row, evenly spaced: those whose entropy is told

Numbers = dict[str, float]


class Propagation(NamedTuple):
    """The numbers of each block by name, those of each parameter by path (of a stacked one a list), and the loss.

    The loss is the mean over what the batch scores, in nats.
    """

    blocks: dict[str, Numbers]
    parameters: dict[str, dict[str, np.ndarray]]
    loss: float


class Probe(nnx.Variable):
    """A zero whose gradient is the squared norm of the gradient that passes the place where it is."""


def propagation(model: Any, loss: Loss, batch: dict[str, Any]) -> Propagation:
    """Return the numbers of one batch; the network stays as it is.

    Args:
      model: the network.
      loss: of `aether.losses.loss_of`; the same object for the same program.
      batch: of the data, as the loss takes it.
    """
    model = nnx.merge(*nnx.split(model), copy=True)
    for blocks, shape in _stacks(model):
        blocks.probe = Probe(jnp.zeros(shape, jnp.float32), axes=())
    graph, probes, params, rest = nnx.split(model, Probe, nnx.Param, ...)  # type: ignore[misc]

    found, sizes, mean = jax.device_get(_run(graph, loss, probes, params, rest, jax.tree.map(jnp.asarray, batch)))
    blocks = {name: {key: float(value) for key, value in found[name].items()} for name in blocks_of(model)}
    return Propagation(blocks, sizes, float(mean))


@partial(jax.jit, static_argnums=(0, 1))
def _run(graph: nnx.GraphDef, loss: Loss, probes: Any, params: Any, rest: Any, batch: dict[str, Array]) -> Any:
    def total(probes: Any, params: Any) -> tuple[Array, Any]:
        network = nnx.merge(graph, probes, params, rest, copy=True)  # variables of this trace
        with wrapped((*BLOCKS, *_BRANCHES), _watched):
            value, sums = loss(network, batch, None)
        found = {name: _numbers(block) for name, block in blocks_of(network).items()}
        return value, (found, value / sums["weight"])

    with jax.default_matmul_precision("highest"):
        (passed, grads), (found, mean) = jax.grad(total, (0, 1), has_aux=True)(probes, params)
    at_block = {name: block.probe[...] for name, block in blocks_of(nnx.merge(graph, passed, grads, rest)).items()}
    for name, numbers in found.items():
        numbers["gradient"] = jnp.sqrt(at_block[name] / numbers.pop("size"))
    pairs = zip(nnx.to_flat_state(params), nnx.to_flat_state(grads), strict=True)
    return found, {"/".join(map(str, path)): _sizes(p, g) for (path, p), (_, g) in pairs}, mean


def _stacks(model: Any) -> Iterator[tuple[Any, tuple[int, ...]]]:
    """Yield what holds blocks, and the shape of one number for each of them."""
    if not isinstance(model, ResNet):
        yield model.blocks, (model.config.layers,)
        return
    for stage in model.stages:
        yield stage.first, ()
        if stage.rest is not None:
            yield stage.rest, (stage.length,)


def _sizes(param: nnx.Variable, grad: nnx.Variable) -> dict[str, Array]:
    stacked = param.get_metadata()["axes"][:1] == ("layers",)
    return {key: _rms(v[...], stacked) for key, v in (("value", param), ("gradient", grad))}


def _rms(x: Array, stacked: bool = False) -> Array:
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), tuple(range(int(stacked), x.ndim))))


@jax.custom_vjp
def _probed(y: Array, probe: Array) -> Array:
    return y


def _probed_back(_: None, g: Array) -> tuple[Array, Array]:
    return g, jnp.sum(jnp.square(g.astype(jnp.float32)))


_probed.defvjp(lambda y, probe: (y, None), _probed_back)

_BRANCHES = (Attention, YatLinearAttention, YatMLP, MLP)


def _watched(kind: type, call: Callable) -> Callable:
    """Return the call of a block or branch so that it notes what it does, and a block's gradient passes its probe."""

    def called(self: Any, x: Array, *args: Any, **kwargs: Any) -> Any:
        result = call(self, x, *args, **kwargs)
        y, *more = result if isinstance(result, tuple) else (result,)
        noted = dict(scale=_rms(y))
        if kind is Attention:  # and `YatAttention`, which inherits the call
            noted["entropy"] = _entropy(self, x, kwargs["is_causal"])
        if kind in BLOCKS:
            noted = dict(stream=_rms(x), size=jnp.float32(y.size))
            noted |= dict(added=_rms(y - x)) if y.shape == x.shape else {}
            y = _probed(y, self.probe[...])
        self.noted = Noted(noted)
        return (y, *more) if more else y

    return called


def _numbers(block: Any) -> dict[str, Array]:
    numbers = dict(block.noted.get_value())
    if isinstance(block, Block):
        parts: Any = (block.attention, block.mlp)
        attention, mlp = (dict(part.noted.get_value()) for part in parts)
        numbers |= dict(attention=attention.pop("scale"), mlp=mlp["scale"], **attention)
    return numbers


def _entropy(layer: Attention, x: Array, is_causal: bool) -> Array:
    t = x.shape[1]
    rows = np.unique(np.linspace(1, t - 1, min(t - 1, QUERIES)).round().astype(int))  # the first position sees itself
    weights, _ = layer.weights(x, jnp.asarray(rows), is_causal=is_causal)
    weights = weights.astype(jnp.float32)
    entropy = -jnp.sum(weights * jnp.log(jnp.where(weights > 0, weights, 1.0)), -1)
    return jnp.mean(entropy / jnp.log(rows + 1 if is_causal else t))
