r"""Print the scale of signals and gradients in a network, block by block; or how it moves with width or depth.

  python -m tools.propagation --config=configs/shakespeare_char.py --config.data.path=tinyshakespeare.txt
  python -m tools.propagation --workdir=runs/a --parameters
  python -m tools.propagation --config=... --vary=model.width=64,128,256,512 --steps=8 --out=coordinates.png

The first is of a network before training, the second of a trained one, with a row for every parameter too: see
`aether.explain.propagation`. The numbers are of the first batch of the training data. To them come, of ⵟ units,
how far x is from the nearest prototype (or q from the nearest key), median, and how well it is aligned with the best.

The third is a coordinate check (Yang et al., 2022, arXiv 2203.03466): for each value a network is trained for some
steps, and after each the numbers of its blocks are taken, mean over blocks, and the scale of the logits. Where the rule
for learning rates and initial scales is right, no line of the picture climbs or falls with the width.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from aether.config import Config
from aether.errors import InputError
from aether.figures import new_figure, plain, png
from aether.storage import write_atomic
from launch import cli, overrides
from tools.study_plan import split_list, sweep_values
from tools.study_tables import markdown

BLOCKS = ("stream", "attention", "mlp", "added", "gradient", "entropy")  # columns, where a network has them
UNITS = ("distance_50", "alignment")
Check = dict[float, list[dict[str, float]]]  # of each value, the numbers after 0, 1, 2 ... steps


def main(args: flags.FlagValues) -> None:
    """Print the tables; with --vary train, print and draw."""
    if args.workdir and (args.config or args.override or args.vary):
        raise InputError(f"--workdir is {args.workdir}, whose config is known; leave --config and --vary out.")
    if args.vary:
        key, texts = split_list("vary", args.vary)
        values = sweep_values(key, texts, "vary")
        found = {value: trained(args.config, [*args.override, f"{key}={value:g}"], args.steps) for value in values}
        print(coordinate_table(key, found))
        if args.out:
            write_atomic(Path(args.out), picture(key, found))
        return
    from aether.explain.propagation import propagation
    from aether.losses import loss_of

    config, model, batch = of_run(args.workdir) if args.workdir else of_config(cli.config_of(args))
    result = propagation(model, loss_of(config), batch)
    print(block_table(result.blocks, unit_numbers(config, model, batch)))
    if args.parameters:
        print("\n" + parameter_table(result.parameters))
    print(f"\nLoss of the batch: {result.loss:.4f} nats.")


def of_config(config: Config) -> tuple[Config, Any, dict[str, np.ndarray]]:
    """Return the resolved config, its network before training, and the first batch of its data."""
    from flax import nnx

    from aether.data.corpus import open_corpus
    from aether.models import make_model

    corpus = open_corpus(config)
    config = corpus.resolved(config)
    return config, make_model(config, nnx.Rngs(config.train.seed)), next(batches(config, corpus))


def of_run(folder: str) -> tuple[Config, Any, dict[str, np.ndarray]]:
    """Return the config of a run, its network at the newest checkpoint, and the first batch of its data."""
    from flax import nnx

    from aether.evaluate.load import load_run
    from aether.evaluate.run import own_corpus

    run = load_run(folder)
    return run.config, nnx.merge(run.graph, run.params), next(batches(run.config, own_corpus(run)))


def batches(config: Config, corpus: Any) -> Iterator[dict[str, np.ndarray]]:
    """Yield batches of the training data as a loss takes them."""
    from aether.data.loader import train_batches

    with contextlib.closing(train_batches(corpus.train, config.data, config.train.seed)) as iterator:  # type: ignore[type-var]
        yield from iterator


def model_call(config: Config, batch: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return what a network is called with for a batch: its input, and keywords."""
    from aether.losses import scaled

    if config.unit == "images":
        return scaled(batch["images"], config.image.mean, config.image.std), {}
    t = config.data.context
    return batch["tokens"][:, :t], {key: batch[key][:, :t] for key in ("segments", "positions")}


def unit_numbers(config: Config, model: Any, batch: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return `aether.explain.telemetry` of the batch; nothing of a network without ⵟ units."""
    from aether.explain.telemetry import telemetry

    if not config.model.has_units:
        return {}
    x, how = model_call(config, batch)
    return telemetry(model, np.asarray(x), **how)


def block_table(blocks: dict[str, dict[str, float]], units: dict[str, dict[str, float]]) -> str:
    """Lay out a row for each block, and columns for its ⵟ layers' numbers."""
    first = next(iter(blocks.values()))
    columns = [name for name in BLOCKS if name in first]
    rows, extra = [], []
    for block, numbers in blocks.items():
        own = {name.removeprefix(f"{block}."): told for name, told in units.items() if name.startswith(f"{block}.")}
        extra = [(layer, name) for layer in own for name in UNITS]
        cells = [f"{numbers[name]:.3g}" if name in numbers else "–" for name in columns]
        rows.append([block, *cells, *(f"{own[layer][name]:.3g}" for layer, name in extra)])
    return markdown(["", *columns, *(f"{layer} {name}" for layer, name in extra)], rows)


def parameter_table(parameters: dict[str, dict[str, np.ndarray]]) -> str:
    """Lay out a row for each parameter: root mean squares of its entries and of its gradient's, over all layers."""
    rows = []
    for path, numbers in parameters.items():
        value, gradient = (float(np.sqrt(np.mean(np.square(numbers[key])))) for key in ("value", "gradient"))
        share = f"{gradient / value:.3g}" if value else "–"
        rows.append([path, f"{value:.3g}", f"{gradient:.3g}", share])
    return markdown(["parameter", "value", "gradient", "gradient / value"], rows)


def trained(path: str, words: list[str], steps: int) -> list[dict[str, float]]:
    """Train a network and return its numbers on the first batch after 0, 1, ..., `steps` steps."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from aether.data.corpus import open_corpus
    from aether.explain.propagation import propagation
    from aether.losses import loss_of
    from aether.models import make_model
    from aether.train.step import init_state, make_step

    config = overrides.make_config(path, words)
    corpus = open_corpus(config)
    config = corpus.resolved(config)
    print(f"{words[-1]} ...", file=sys.stderr, flush=True)
    graph, params, extras = nnx.split(make_model(config, nnx.Rngs(config.train.seed)), nnx.Param, ...)
    loss, state = loss_of(config), init_state(config, params, extras)
    step = jax.jit(make_step(config, graph, loss, params), donate_argnums=0)

    @jax.jit
    def logits(variables: Any, batch: Any) -> Any:
        model = nnx.merge(graph, variables, copy=True)
        x, how = model_call(config, batch)
        y = model(x, **how)
        y = model.logits(y[0] if isinstance(y, tuple) else y) if config.unit == "tokens" else y
        return jnp.sqrt(jnp.mean(jnp.square(y)))

    found, stream = [], batches(config, corpus)
    first = jax.tree.map(np.asarray, next(stream))
    for made in range(steps + 1):
        model = nnx.merge(graph, state.params, state.extras, copy=True)
        passed = propagation(model, loss, first)
        mean = {key: np.mean([b[key] for b in passed.blocks.values() if key in b]) for key in BLOCKS[:4]}
        mean = {key: float(value) for key, value in mean.items() if np.isfinite(value)}
        scale = logits(nnx.merge_state(state.params, state.extras), first)
        found.append(mean | dict(logits=float(scale), loss=passed.loss))
        if made < steps:
            state, _ = step(state, first if made == 0 else next(stream))
    stream.close()  # type: ignore[attr-defined]
    return found


def coordinate_table(key: str, found: Check) -> str:
    """Lay out the numbers before and after training, a row for each value, and their exponents: d log / d log value."""
    names = list(next(iter(found.values()))[0])
    rows = [
        [f"{value:g}", *(f"{numbers[at][name]:.3g}" for name in names for at in (0, -1))]
        for value, numbers in found.items()
    ]
    head = [key, *(f"{name} {when}" for name in names for when in ("before", "after"))]
    if len(found) > 1:
        x = np.log(list(found))
        series = [[numbers[at][name] for numbers in found.values()] for name in names for at in (0, -1)]
        rows.append(["exponent", *(f"{np.polyfit(x, np.log(y), 1)[0]:+.2f}" if min(y) > 0 else "–" for y in series)])
    return markdown(head, rows)


def picture(key: str, found: Check) -> bytes:
    """Draw a panel for each number over the values, a line for each step, the last one darkest."""
    import matplotlib

    names = list(next(iter(found.values()))[0])
    steps = len(next(iter(found.values())))
    rows = -(-len(names) // 3)
    figure = new_figure(9.6, 2.9 * rows, dpi=130)
    colors = matplotlib.colormaps["viridis_r"](np.linspace(0.1, 1.0, steps))
    axes = figure.subplots(rows, 3, squeeze=False).flat
    for name, axis in zip(names, axes, strict=False):
        for k in range(steps):
            axis.plot(
                list(found), [numbers[k][name] for numbers in found.values()], "o-", ms=3, color=colors[k], label=k
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        room = max(1.0, (10.0 * low / high) ** 0.5)  # a decade at least: small changes look small
        axis.set_ylim(low / room, high * room)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        axis.set_xticks(list(found), [f"{value:g}" for value in found])
        axis.set_title(name)
        axis.set_xlabel(key)
        plain(axis)
    for axis in axes:
        axis.axis("off")
    axis = figure.axes[len(names) - 1]
    axis.legend(title="steps", frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return png(figure)


def define() -> flags.FlagValues:
    """Return the flags."""
    values = cli.new_flags(config=True)
    flags.DEFINE_string("workdir", "", "a run whose newest checkpoint is looked at, instead of --config", values)
    flags.DEFINE_bool("parameters", False, "print a row for every parameter too", values)
    flags.DEFINE_string("vary", "", "KEY=NUMBER,NUMBER: train a network with each, as in model.width=64,128", values)
    flags.DEFINE_integer("steps", 8, "steps of these trainings", 1, None, values)
    flags.DEFINE_string("out", "", "PNG of what --vary found", values)
    return values


FLAGS = define()

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
