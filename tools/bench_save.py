"""What `python -m tools.bench --what=save` measures: the time that training loses to a save in the background."""

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

STEPS = 5  # after a save
WIDTH = 512


def rows(sizes: list[int], rounds: int) -> Iterator[dict[str, Any]]:
    """Yield for each size of the state (MB), and each way to keep it from the next step, what a save costs.

    `lost_ms` is the time of a save and five steps less that of five steps without a save, just before and just after;
    `call_ms` is the part of it that the call takes, the rest is the copy and the writer's use of the CPU. `share` is
    the loss over `save_ms`, from the call until the checkpoint is verified; `alone_ms` is what a save takes where
    nothing else runs. All are medians over the rounds.
    """
    for size in sizes:
        step, state = training(size)
        for name, keep in KEEPS.items():
            yield dict(megabytes=size, keep=name) | measure(step, state, keep, rounds)


def training(megabytes: int) -> tuple[Callable[[Any], Any], Any]:
    """Return a compiled, donating step of Adam through a stack of matrices, and a first state of this size."""
    import jax
    import jax.numpy as jnp

    layers = max(1, megabytes * 10**6 // (3 * 4 * WIDTH**2))
    x = jax.random.normal(jax.random.key(1), (64, WIDTH))

    def loss(params: jax.Array) -> jax.Array:
        hidden, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params)
        return jnp.mean(hidden**2)

    def step(state: Any) -> Any:
        slope = jax.grad(loss)(state["params"])
        mean = 0.9 * state["mean"] + 0.1 * slope
        square = 0.99 * state["square"] + 0.01 * slope**2
        return dict(params=state["params"] - 1e-3 * mean / (jnp.sqrt(square) + 1e-8), mean=mean, square=square)

    params = jax.random.normal(jax.random.key(0), (layers, WIDTH, WIDTH)) / WIDTH**0.5
    # Noise in the moments too: zeros are written in no time.
    state = dict(params=params, mean=params * 1e-3, square=params**2)
    return jax.jit(step, donate_argnums=0), state


def measure(step: Callable[[Any], Any], state: Any, keep: Callable[[Any], Any], rounds: int) -> dict[str, Any]:
    """Return the medians of one way."""
    import jax

    from aether import arrays
    from aether.checkpoint import Checkpoints
    from aether.config import CheckpointConfig

    def run(state: Any) -> Any:
        for _ in range(STEPS):
            state = jax.block_until_ready(step(state))
        return state

    times: list[dict[str, float]] = []
    owned, on_host, arrays.owned = arrays.owned, arrays.on_host, keep
    if keep is shared:
        arrays.on_host = lambda leaf: False  # so that the call returns when Orbax holds the memory, not before
    state = jax.block_until_ready(jax.tree.map(lambda x: x.copy(), state))
    try:
        with tempfile.TemporaryDirectory() as folder:
            checkpoints = Checkpoints(folder, CheckpointConfig(keep_last=1, keep_best=0))
            for i in range(rounds + 1):
                begin = time.perf_counter()
                state = run(state)
                middle = time.perf_counter()
                checkpoints.save(2 * i, state, meta={})
                called = time.perf_counter()
                end = watch(checkpoints)
                state = run(state)
                whole, save = time.perf_counter() - middle, end() - middle
                again = time.perf_counter()
                state = run(state)
                last = time.perf_counter()
                checkpoints.save(2 * i + 1, state, meta={})
                checkpoints.wait()
                plain = (middle - begin + last - again) / 2
                alone = time.perf_counter() - last
                times.append(dict(lost=whole - plain, call=called - middle, save=save, alone=alone, plain=plain))
            checkpoints.close()
    finally:
        arrays.owned, arrays.on_host = owned, on_host
    typical = {key: statistics.median(t[key] for t in times[1:]) for key in times[0]}  # the first warms up
    return dict(
        share=typical["lost"] / typical["save"],
        lost_ms=1e3 * typical["lost"],
        call_ms=1e3 * typical["call"],
        save_ms=1e3 * typical["save"],
        alone_ms=1e3 * typical["alone"],
        step_ms=1e3 * typical["plain"] / STEPS,
        rounds=rounds,
    )


def watch(checkpoints: Any) -> Callable[[], float]:
    """Return a function that waits for the save under way and returns when it ended."""
    ended: list[float] = []

    def join() -> None:
        checkpoints._writer._thread.join()
        ended.append(time.perf_counter())

    thread = threading.Thread(target=join)
    thread.start()

    def end() -> float:
        thread.join()
        return ended[0]

    return end


def copied(leaf: Any) -> Any:
    """Copy by JAX."""
    import jax

    return jax.device_put(leaf, leaf.sharding, may_alias=False)


def in_numpy(leaf: Any) -> Any:
    """Copy by NumPy."""
    import numpy as np

    return np.array(leaf)


def shared(leaf: Any) -> Any:
    """Keep the same memory."""
    return leaf


# Name -> what stands between the state and the next step, which would overwrite it.
KEEPS = dict(copy=copied, numpy=in_numpy, none=shared)
