"""The training state and the pure function that advances it by one batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from aether.config import Config
from aether.losses import Loss
from aether.train.optim import learning_rate_scales, make_optimizer, make_schedule

Batch = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclass
class TrainState:
    """Everything that a run carries from step to step.

    `params` and `ema` (None when off) are `nnx.State`s; `skipped` counts all non-finite steps.
    """

    step: Array
    params: Any
    opt_state: Any
    ema: Any
    skipped: Array
    skipped_in_a_row: Array


def init_state(config: Config, params: Any) -> TrainState:
    """Return the state before the first update."""
    opt_state = make_optimizer(config.optim).init(params)
    ema = jax.tree.map(jnp.copy, params) if config.train.ema else None
    step, skipped, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))
    return TrainState(step, params, opt_state, ema, skipped, in_a_row)


def make_step(
    config: Config, graph: nnx.GraphDef, loss: Loss, params: Any
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """Return step(state, batch) -> (state, metrics): pure, to be jitted with a donated state.

    The batch may be split into `train.accumulate` microbatches; their gradients are those of summed losses, divided by
    the tokens of the whole batch, so that the result does not depend on the split. A step whose loss or gradient is not
    finite changes nothing but the counters. Metrics: loss (nats a token), accuracy, grad_norm, learning_rate, tokens,
    skipped, skipped_in_a_row.

    Args:
      config: resolved.
      graph: of the model; merged with the parameters at each call.
      loss: one of `aether.losses.LOSSES`, its options bound.
      params: shapes are enough; decides learning rates and decay by path.
    """
    optimizer, schedule = make_optimizer(config.optim), make_schedule(config.optim)
    scales = learning_rate_scales(config.optim, params)
    seed, decay = config.train.seed, config.train.ema

    def total(params: Any, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
        return loss(nnx.merge(graph, params), batch, key)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, sums = accumulate(total, state.params, batch, key, config.train.accumulate)
        weight = jnp.maximum(sums["weight"], 1.0)
        grads = jax.tree.map(lambda g: g / weight, grads)
        grad_norm = optax.tree.norm(grads)
        nats = sums["nll"] / weight
        rate = schedule(state.step + 1)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(
            lambda s, p, u: jax.tree.map(lambda p, u: p + rate * s * u, p, u), scales, state.params, updates
        )
        ema = state.ema
        if decay:
            ema = jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, ema, params)

        finite = jnp.isfinite(nats) & jnp.isfinite(grad_norm)
        bad = 1 - finite.astype(jnp.int32)
        params, opt_state, ema = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state, ema),
            (state.params, state.opt_state, state.ema),
        )
        row = jnp.where(finite, 0, state.skipped_in_a_row + 1)
        state = TrainState(state.step + 1, params, opt_state, ema, state.skipped + bad, row)
        metrics = dict(
            loss=nats,
            accuracy=sums["correct"] / weight,
            grad_norm=grad_norm,
            learning_rate=rate,
            tokens=sums["weight"],
            skipped=state.skipped,
            skipped_in_a_row=row,
        )
        return state, metrics

    return step


def accumulate(total: Callable, params: Any, batch: Batch, key: Array, pieces: int) -> tuple[Any, dict[str, Array]]:
    """Return gradients and sums of `total(params, batch, key)` added over `pieces` microbatches.

    Microbatch i takes the rows i, i + pieces, …, so that each spreads over all devices.
    """
    grad = jax.grad(total, has_aux=True)
    if pieces == 1:
        return grad(params, batch, key)
    split = {k: v.reshape(-1, pieces, *v.shape[1:]).swapaxes(0, 1) for k, v in batch.items()}
    keys = jax.random.split(key, pieces)

    def body(carry: tuple, xs: tuple[Batch, Array]) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, carry, grad(params, *xs)), None

    shapes = jax.eval_shape(grad, params, jax.tree.map(lambda v: v[0], split), keys[0])
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(body, zeros, (split, keys))[0]
