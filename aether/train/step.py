"""The training state and the pure function that advances it by one batch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from aether.config import Config
from aether.explain.capacity import penalty
from aether.losses import Loss
from aether.train.optim import learning_rate_scales, make_hold, make_optimizer, make_schedule
from aether.train.spikes import empty_window, is_spike, pushed

Batch = dict[str, Array]
STOP = "stop"  # in the batches of several processes: the signal that a device's process has seen, or 0


@jax.tree_util.register_dataclass
@dataclass
class TrainState:
    """Everything that a run carries from step to step.

    `params`, `extras` and `ema` (None when off) are `nnx.State`s: what is trained, what a forward pass changes (the
    statistics of BatchNorm), and averages of both; `skipped` counts all steps without an update; `window` holds the
    last losses (None when spikes are not looked for).
    """

    step: Array
    params: Any
    opt_state: Any
    ema: Any
    skipped: Array
    skipped_in_a_row: Array
    window: Any = None
    extras: Any = field(default_factory=lambda: nnx.State({}))

    @property
    def variables(self) -> Any:
        """What a model of this state is merged from, the averages where they are kept."""
        return nnx.merge_state(self.params, self.extras) if self.ema is None else self.ema


def init_state(config: Config, params: Any, extras: Any = None) -> TrainState:
    """Return the state before the first update."""
    extras = nnx.State({}) if extras is None else extras
    opt_state = make_optimizer(config.optim).init(params)
    ema = jax.tree.map(jnp.copy, nnx.merge_state(params, extras)) if config.train.ema else None
    step, skipped, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))
    window = empty_window(config.faults.spike_window) if config.faults.spike_sigma else None
    return TrainState(step, params, opt_state, ema, skipped, in_a_row, window, extras)


def make_step(
    config: Config,
    graph: nnx.GraphDef,
    loss: Loss,
    params: Any,
    *,
    seed: int | Array | None = None,
    learning_rate: float | Array | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """Return step(state, batch) -> (state, metrics): pure, to be jitted with a donated state.

    The batch may be split into `train.accumulate` microbatches; their gradients are those of summed losses, divided by
    what the whole batch scores, so that the result does not depend on the split, but for what looks at a microbatch as
    a whole: BatchNorm's statistics, and the partners of mixed images. `optim.rkhs_decay` times the gradient of
    `aether.explain.capacity.penalty` is taken off the parameters times the learning rate, as weight decay is: neither
    clipping nor Adam's scales, which are the loss's, see it. A step whose loss or gradient is not finite, or
    whose loss is a spike (`aether.train.spikes`), changes nothing but the counters. Metrics: loss (nats a token or
    image), accuracy (of mixed images against their own labels), grad_norm, learning_rate, `tokens` or `images`, those
    that were scored, skipped, skipped_in_a_row, where spikes are looked for `spike`, and where the batch carries `stop`
    its largest number.

    Args:
      config: resolved.
      graph: of the model; merged with the parameters at each call.
      loss: one of `aether.losses.LOSSES`, its options bound.
      params: shapes are enough; decides learning rates and decay by path.
      seed: in place of `train.seed`; may be traced, as the next.
      learning_rate: in place of `optim.learning_rate`.
    """
    optimizer, schedule = make_optimizer(config.optim), make_schedule(config.optim, learning_rate)
    scales = learning_rate_scales(config.optim, params, config.model)
    hold = make_hold(config.optim, params)
    seed = config.train.seed if seed is None else seed
    decay, sigma = config.train.ema, config.faults.spike_sigma
    rkhs_decay = config.optim.rkhs_decay

    def total(params: Any, extras: Any, batch: Batch, key: Array) -> tuple[Array, tuple[dict[str, Array], Any]]:
        model = nnx.merge(graph, params, extras, copy=True)  # variables of this trace, which a loss may change
        value, sums = loss(model, batch, key)
        return value, (sums, nnx.state(model, nnx.Not(nnx.Param)))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        stops = {k: jnp.max(batch[k]) for k in batch if k == STOP}
        batch = {k: v for k, v in batch.items() if k != STOP}
        grads, sums, extras = accumulate(total, state.params, state.extras, batch, key, config.train.accumulate)
        weight = jnp.maximum(sums["weight"], 1.0)
        with jax.named_scope("optimizer"):
            grads = jax.tree.map(lambda g: g / weight, grads)
            grad_norm = optax.tree.norm(grads)
        nats = sums["nll"] / weight
        rate = schedule(state.step + 1)

        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            if rkhs_decay:
                pull = jax.grad(lambda params: penalty(nnx.merge(graph, params, state.extras, copy=True)))(state.params)
                updates = jax.tree.map(lambda u, g: u - rkhs_decay * g, updates, pull)
            params = jax.tree.map(
                lambda s, p, u: jax.tree.map(lambda p, u: p + rate * s * u, p, u), scales, state.params, updates
            )
            params = hold(params, state.params)
            ema = state.ema
            if decay:
                new = nnx.merge_state(params, extras)
                ema = jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, ema, new)

        finite = jnp.isfinite(nats) & jnp.isfinite(grad_norm)
        window, spike = state.window, jnp.bool_(False)
        if window is not None:
            spike = finite & is_spike(window, nats, sigma)
            window = jnp.where(finite & ~spike, pushed(window, nats), window)
        made = finite & ~spike
        bad = 1 - made.astype(jnp.int32)
        with jax.named_scope("optimizer"):
            params, opt_state, ema, extras = jax.tree.map(
                lambda new, old: jnp.where(made, new, old),
                (params, opt_state, ema, extras),
                (state.params, state.opt_state, state.ema, state.extras),
            )
        row = jnp.where(made, 0, state.skipped_in_a_row + 1)
        state = TrainState(state.step + 1, params, opt_state, ema, state.skipped + bad, row, window, extras)
        metrics = dict(
            loss=nats,
            accuracy=sums["correct"] / weight,
            grad_norm=grad_norm,
            learning_rate=rate,
            skipped=state.skipped,
            skipped_in_a_row=row,
        )
        metrics[config.unit] = sums["weight"]
        if window is not None:
            metrics["spike"] = spike.astype(jnp.int32)
        return state, metrics | stops

    return step


def accumulate(
    total: Callable, params: Any, extras: Any, batch: Batch, key: Array, pieces: int
) -> tuple[Any, dict[str, Array], Any]:
    """Return gradients and sums of `total(params, extras, batch, key)` added over `pieces` microbatches, and extras.

    Microbatch i takes the rows i, i + pieces, …, so that each spreads over all devices; extras pass from one to the
    next.
    """
    grad = jax.grad(total, has_aux=True)
    if pieces == 1:
        grads, (sums, extras) = grad(params, extras, batch, key)
        return grads, sums, extras
    split = {k: v.reshape(-1, pieces, *v.shape[1:]).swapaxes(0, 1) for k, v in batch.items()}
    keys = jax.random.split(key, pieces)

    def body(carry: tuple, xs: tuple[Batch, Array]) -> tuple[tuple, None]:
        added, extras = carry
        grads, (sums, extras) = grad(params, extras, *xs)
        return (jax.tree.map(jnp.add, added, (grads, sums)), extras), None

    first = jax.tree.map(lambda v: v[0], split)
    grads, (sums, _) = jax.eval_shape(grad, params, extras, first, keys[0])
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (grads, sums))
    (added, extras), _ = jax.lax.scan(body, (zeros, extras), (split, keys))
    return *added, extras
