"""What `python -m tools.bench --what=telemetry` measures: what a look at the ⵟ units costs beside a training step."""

import io
import statistics
import tempfile
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from aether.config import Config
from launch.overrides import make_config
from tools.bench_compare import said_of
from tools.bench_step import random_batch
from tools.bench_where import Where

EVERY = 100  # steps between looks, for which shares are given
PAIRS = 20  # a round
DIGITS = ["image.size=8", "image.channels=1", "model.classes=10"]
HERE = {"configs/quickstart.py": [], "configs/digits.py": DIGITS}
ABSENT = {"configs/aether_124m.py": ["data.batch_size=8"]}


def rows(args: Any, where: Where) -> Iterator[dict[str, Any]]:
    """Yield a row for --config with its overrides, or for each of the defaults.

    `flops` is that of the products of a look over the step's, `share` that of the time that looks every 100 steps take:
    median over pairs of a step and a look, its lines written, in the same moment. For a device that is not here by the
    cycles of its compiler.
    """
    from aether.plan.measure import resolved

    configs = {args.config: []} if args.config else ABSENT if where.topology else HERE
    for path, own in configs.items():
        yield dict(what="telemetry", config=path) | row(
            resolved(make_config(path, [*own, *args.override, f"train.telemetry_every={EVERY}"])), where, args.rounds
        )


def row(config: Config, where: Where, rounds: int) -> dict[str, Any]:
    """Compile the step and the look, count both, and time them unless the device is not here."""
    import jax

    from aether import parallel
    from aether.losses import loss_of
    from aether.train.setup import batch_shapes, compile_step, describe_state
    from aether.train.units import Units

    mesh, loss = where.mesh, loss_of(config)
    graph, make, like = describe_state(config, mesh)
    begin = time.perf_counter()
    step = compile_step(config, graph, loss, like, mesh)
    between = time.perf_counter()
    units = Units(config, graph, loss, like, batch_shapes(config, mesh), mesh)
    seconds = dict(compile_step=between - begin, compile_look=time.perf_counter() - between)
    whole, look = (said_of(program, bool(where.topology)) for program in (step, units.program))
    found = dict(batch=config.data.batch_size, rows=config.train.telemetry_rows, **seconds)
    found |= dict(flops=look["flops"] / whole["flops"], temp_bytes=look["temp_bytes"], step_temp=whole["temp_bytes"])
    if where.topology:
        ratio = look["cycles"] / whole["cycles"] if look["cycles"] and whole["cycles"] else None
        return found | dict(cycles=ratio, share=ratio and ratio / EVERY)
    state = jax.jit(make, out_shardings=parallel.shardings(like, mesh, config.mesh))()
    return found | timed(config, step, units, state, random_batch(config, mesh), PAIRS * rounds)


def timed(config: Config, step: Any, units: Any, state: Any, batch: Any, pairs: int) -> dict[str, Any]:
    """Time pairs of a step and of a look with everything that comes of it."""
    import jax

    from aether.train.report import Reporter
    from aether.train.telemetry import Telemetry
    from aether.workdir import Workdir

    steps, looks = [], []
    with tempfile.TemporaryDirectory() as folder:
        how = dict(total_steps=pairs, start_step=0, name="bench", config={}, told=True, stream=io.StringIO())
        with Reporter(Workdir(folder), **how) as reporter:
            run: Any = SimpleNamespace(units=units, config=config)
            telemetry = Telemetry(run, reporter)
            for k in range(pairs + 5):
                begin = time.perf_counter()
                state, _ = jax.block_until_ready(step(state, batch))
                between = time.perf_counter()
                telemetry((k + 1) * EVERY, state, batch)
                telemetry.finish()
                steps.append(between - begin)
                looks.append(time.perf_counter() - between)
    ratio = statistics.median(b / a for a, b in zip(steps[5:], looks[5:], strict=True))
    times = dict(step_ms=1e3 * statistics.median(steps[5:]), look_ms=1e3 * statistics.median(looks[5:]))
    return times | dict(ratio=ratio, share=ratio / EVERY)
