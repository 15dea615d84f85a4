"""How near an input of a network is to centres and how sure the network is of it: what `outside` makes scores of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from aether.errors import InputError
from aether.explain.layers import BLOCKS, layers_of, observing
from aether.explain.prototypes import KINDS
from aether.kernels.conv import convolve, patch_squares
from aether.models import resnet
from aether.models.block import MLP
from aether.models.text import TextModel
from aether.nn import YatConv2D, YatNMN

NEAR = ("distance", "relative", "response", "total")  # a number for each layer
VECTORS = ("profile", "units", "stream")  # a vector for each layer or block
_PLACES = 2**14  # pixels that are looked at together; of ids a sixteenth, for the sake of their logits


class Sure(NamedTuple):
    """How sure a network is of n inputs.

    Attributes:
      confidence: (n,), the largest probability; of texts the mean over positions.
      energy: (n,), −log Σ exp(logits), likewise.
      nll: (n,), nats an id of causal texts, the first left out; None of others.
      guess: (n, places), the likeliest class; of causal texts the likeliest next id at all positions but the last.
      each: (n, places), the probability of each guess.
    """

    confidence: np.ndarray
    energy: np.ndarray
    nll: np.ndarray | None
    guess: np.ndarray
    each: np.ndarray


def distances(
    model: Any, by: str = "distance", *, places: bool = False
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Return a function of inputs (n, ...): how far each is from the nearest centre of each ⵟ layer, (n,) by name.

    Args:
      model: a network.
      by: one of NEAR; `response` and `total` are minus the responses.
      places: do not take means: (n, places), places row by row, or the positions of a text.

    Raises:
      InputError: `by` is none of them, or the network has no ⵟ layer with prototypes.
    """
    if by not in NEAR:
        raise InputError(f"by is {by!r}; it takes one of {', '.join(NEAR)}.")
    if not any(isinstance(layer, KINDS) for layer in layers_of(model).values()):
        raise InputError("The network has no ⵟ units with prototypes to be far from; sure() tells how sure it is.")

    def look(part: Any, x: Array, y: Array) -> Any:
        found = near(part, x, y)[by]
        return found if places else jnp.mean(found, -1)

    run = observing(model, look, kinds=KINDS)
    return lambda x: _batched(run, x)[0]


def sure(model: Any) -> Callable[[np.ndarray], Sure]:
    """Return a function of inputs (n, ...): how sure any network of `aether.models` is of each."""
    run = observing(model, lambda *_: None, _answer, kinds=())
    return lambda x: _batched(run, x)[1]


def near(layer: YatNMN | YatConv2D, x: Array, y: Array) -> dict[str, Array]:
    """Return the scores of NEAR at each place, (b, places), and log(‖x − w‖² + ε), (b, places, units); float32.

    Args:
      layer: with prototypes; of a spherical one x and w are unit vectors.
      x: its input, (b, ..., d).
      y: its output.
    """
    w, x = layer.prototypes(None, "float32"), x.astype(jnp.float32)
    b, units = len(x), w.shape[-1]
    if isinstance(layer, YatConv2D):
        x, window = layer.window(x)
        dot, length = convolve(window, x, w), patch_squares(x, window)
        length = jnp.repeat(length, units // window.groups, -1)
    else:
        dot = jnp.matmul(x, w, precision="highest")
        length = jnp.broadcast_to(jnp.sum(x * x, -1, keepdims=True), dot.shape)
    dot, length, size = (a.reshape(b, -1, units) for a in (dot, length, jnp.abs(y.astype(jnp.float32))))
    own = jnp.sum(w * w, tuple(range(w.ndim - 1)))
    if layer.spherical:
        dot = dot * jnp.where((length > 0) & (own > 0), jax.lax.rsqrt(jnp.maximum(length * own, 1e-38)), 0.0)
        length, own = (length > 0).astype(jnp.float32), (own > 0).astype(jnp.float32)
    both = length + own
    square = jnp.maximum(both - 2 * dot, 0.0)
    return dict(
        distance=jnp.min(square, -1),
        relative=jnp.min(square / jnp.maximum(both, 1e-38), -1),
        response=-jnp.max(size, -1),
        total=-jnp.sum(size, -1),
        profile=jnp.log(square + layer.unit()["epsilon"]),
    )


class Measured(NamedTuple):
    """What n inputs look like to a network.

    Attributes:
      near: layer -> score of NEAR -> (n,), means over places.
      profile: layer -> (n, units), the means of log(‖x − w‖² + ε).
      units: layer -> (n, units), the means of its outputs; of a baseline those of hidden units after ReLU or GELU.
      stream: residual block -> (n, d), the mean of what it puts out.
      sure: of the answer.
    """

    near: dict[str, dict[str, np.ndarray]]
    profile: dict[str, np.ndarray]
    units: dict[str, np.ndarray]
    stream: dict[str, np.ndarray]
    sure: Sure


def measuring(model: Any) -> Callable[[np.ndarray], Measured]:
    """Return a function of inputs (n, ...) that measures them, in one pass; of a baseline `near` is empty."""
    run = observing(model, _look, _answer)

    def measure(x: np.ndarray) -> Measured:
        parts, answer = _batched(run, x)
        near = {name: {key: found[key] for key in NEAR} for name, found in parts.items() if "profile" in found}
        vectors = {key: {name: found[key] for name, found in parts.items() if key in found} for key in VECTORS}
        return Measured(near=near, sure=answer, **vectors)

    return measure


def _look(part: Any, x: Array, y: Array) -> dict[str, Array]:
    """Return means over places: of a layer those of `near` and its units' outputs, of a block what it puts out."""
    if isinstance(part, KINDS):
        return {name: jnp.mean(a, 1) for name, a in near(part, x, y).items()} | dict(units=_pooled(y))
    if isinstance(part, MLP):
        return dict(units=_pooled(y))
    if isinstance(part, resnet.Block):
        hidden = part.hidden(x if part.reduce is None else part.reduce(x, False), False)  # again, which XLA merges
        return dict(units=_pooled(hidden), stream=_pooled(y))
    return dict(stream=_pooled(y)) if isinstance(part, BLOCKS) else {}


def _pooled(y: Array) -> Array:
    return jnp.mean(y.reshape(len(y), -1, y.shape[-1]).astype(jnp.float32), 1)


def _answer(model: Any, x: Array, y: Any) -> Sure:
    text, causal = isinstance(model, TextModel), isinstance(y, tuple)
    logits = model.logits(y[0] if causal else y) if text else y[:, None]
    log_p = jax.nn.log_softmax(logits)
    each = jnp.max(log_p, -1)
    guess = jnp.where(jnp.isfinite(each), jnp.argmax(logits, -1), -1)
    each, energy = jnp.where(jnp.isfinite(each), jnp.exp(each), 0.0), -jax.nn.logsumexp(logits, -1)
    nll = None
    if causal:
        nll = -jnp.mean(jnp.take_along_axis(log_p[:, :-1], x[:, 1:, None], -1)[..., 0], -1)
    last = -1 if causal else None
    found: Any = jnp.mean(each, -1), jnp.mean(energy, -1), nll, guess[:, :last], each[:, :last]
    return Sure(*found)


def _batched(observe: Callable[[np.ndarray], tuple[dict[str, Any], Any]], x: np.ndarray) -> tuple[dict[str, Any], Any]:
    """Return observe(x), computed in batches of a size that depends on x[0] alone: to compile takes longest.

    The last batch is filled up with its first row.
    """
    x = np.asarray(x)
    if not len(x):
        raise InputError("There is no input to look at; give at least one.")
    most = _PLACES // 16 if x.ndim == 2 else _PLACES
    rows, found = max(1, most // int(np.prod(x.shape[1:3]))), []
    for begin in range(0, len(x), rows):
        part = x[begin : begin + rows]
        found.append(observe(np.concatenate([part, np.repeat(part[:1], rows - len(part), 0)])))
    parts, ends = zip(*found, strict=True)
    return _joined(len(x), *parts), _joined(len(x), *ends)


def _joined(count: int, *each: Any) -> Any:
    """Return the first rows of trees of arrays end to end; dicts stay in their order, which `jax.tree.map` loses."""
    if isinstance(each[0], dict):
        return {key: _joined(count, *(one[key] for one in each)) for key in each[0]}
    return jax.tree.map(lambda *arrays: np.concatenate(arrays)[:count], *each)
