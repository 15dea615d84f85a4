"""Train runs that differ in nothing but seed and learning rate as one program, for `tools.study --together`.

The training step of `launch.train` under `jax.vmap`: a small network leaves most of an accelerator idle, and compiles
for longer than it trains (LOG.md). Each copy has the parameters, batches and keys that it has alone. All are on one
device, and there are no checkpoints: a killed program begins again.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags

from aether.errors import InputError
from launch import cli


@dataclass(frozen=True)
class Copy:
    """A run: its name, its learning rate (None: the config's) and its seed."""

    run: str
    value: float | None
    seed: int


def main(values: flags.FlagValues) -> None:
    """Train the copies and write how they ended to --result."""
    config = cli.config_of(values)
    copies = [Copy(**copy) for copy in json.loads(cli.require(values, "copies", "'[]'"))]
    made = train_together(config, copies)
    Path(cli.require(values, "result", "result.json")).write_text(json.dumps(made), encoding="utf-8")


def train_together(config: Any, copies: Sequence[Copy]) -> dict[str, Any]:
    """Train all copies and score them on every validation set.

    Args:
      config: as built, not resolved; its seed and learning rate are the copies'.
      copies: the runs.

    Returns:
      `runs`, by name what `tools.study_runs` writes down of each; the resolved `config`; the revision `git`.

    Raises:
      InputError: `train.init_from`, which is `launch.train`'s to restore.
    """
    if config.train.init_from:
        raise InputError(
            f"--together starts from fresh parameters, and train.init_from is {config.train.init_from!r}; "
            "leave --together out."
        )
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from tqdm import trange

    from aether import parallel
    from aether.data.corpus import open_corpus
    from aether.data.loader import evaluation_batches, train_batches
    from aether.evaluate.metrics import scorer_of
    from aether.losses import loss_of
    from aether.models import describe_model, make_model
    from aether.train.setup import git_revision
    from aether.train.step import TrainState, init_state, make_step

    corpus = open_corpus(config)
    config = corpus.resolved(config)
    rows, loss = list(range(config.data.batch_size)), loss_of(config)
    graph, params, _ = describe_model(config)
    seeds = jnp.asarray([copy.seed for copy in copies])
    rates = jnp.asarray([config.optim.learning_rate if copy.value is None else copy.value for copy in copies])

    @jax.jit
    def first(seed: jax.Array) -> TrainState:
        return init_state(config, *nnx.split(make_model(config, nnx.Rngs(jax.random.key(seed))), nnx.Param, ...)[1:])

    def one(state: TrainState, batch: Any, seed: jax.Array, rate: jax.Array) -> tuple[TrainState, jax.Array]:
        state, metrics = make_step(config, graph, loss, params, seed=seed, learning_rate=rate)(state, batch)
        return state, metrics["skipped_in_a_row"]

    step = jax.jit(jax.vmap(one), donate_argnums=0)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[first(seed) for seed in seeds])
    read = {s: train_batches(corpus.train, config.data, s, rows=rows) for s in {copy.seed for copy in copies}}
    worst = jnp.zeros(len(copies), jnp.int32)
    for _ in trange(config.train.steps, file=sys.stderr, mininterval=10):
        batches = {seed: next(stream) for seed, stream in read.items()}
        batch = {k: np.stack([batches[copy.seed][k] for copy in copies]) for k in next(iter(batches.values()))}
        state, in_a_row = step(state, batch, seeds, rates)
        worst = jnp.maximum(worst, in_a_row)
    for stream in read.values():
        stream.close()

    score = scorer_of(config, corpus.tokenizer, graph, parallel.make_mesh(config.mesh, jax.devices()[:1]))
    runs = {}
    for i, copy in enumerate(copies):
        variables = jax.tree.map(lambda leaf, i=i: leaf[i], state.variables)
        scores = {
            name: score(variables, evaluation_batches(examples, config.data, config.train.eval_batches, rows))
            for name, examples in corpus.validation.items()
        }
        losses = {name: s["loss"] if math.isfinite(s["loss"]) else None for name, s in scores.items()}
        main = next(iter(scores.values()))
        lost = int(worst[i]) >= config.train.max_skipped or not math.isfinite(main["loss"])
        ended = dict(loss=None, accuracy=None) if lost else dict(loss=main["loss"], accuracy=main["accuracy"])
        runs[copy.run] = dict(status="diverged" if lost else "done", losses=losses, parameters=parameters, **ended)
    return dict(runs=runs, config=config.to_json(), git=git_revision())


def define() -> flags.FlagValues:
    """Return the flags."""
    values = cli.new_flags(config=True)
    flags.DEFINE_string("copies", "", "JSON list of runs, each with `run`, `value` and `seed`", values)
    flags.DEFINE_string("result", "", "JSON file to write", values)
    return values


if __name__ == "__main__":
    sys.exit(cli.run(main, define(), __doc__))
