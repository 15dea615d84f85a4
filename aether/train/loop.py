"""The training loop, one for every model and loss."""

import time
from contextlib import ExitStack
from typing import Any

import jax

from aether import parallel
from aether.config import Config
from aether.data.loader import train_batches
from aether.errors import Stopped
from aether.train.evaluator import Evaluator
from aether.train.meter import Meter, divides
from aether.train.profile import Profiler
from aether.train.report import Reporter, finished
from aether.train.setup import Run, say, start
from aether.train.signals import Stop, stop_signals


def train(config: Config, workdir: str, *, started: float | None = None) -> None:
    """Train from the config, or go on with the run in `workdir`, until `train.steps` updates are made.

    Args:
      config: as built, not resolved.
      workdir: a folder, or gs:// or s3://.
      started: `time.perf_counter()` when the process began, for the times of the start-up.

    Raises:
      Stopped: a signal came; everything is saved.
      CheckError: too many non-finite steps in a row.
    """
    with stop_signals() as stop:
        try:
            run = start(config, workdir, time.perf_counter() if started is None else started)
            stop.patient = True
        except KeyboardInterrupt:
            raise Stopped(
                f"Stopped by {stop()} during the start, so nothing is lost; the same command goes on."
            ) from None
        if run is not None:
            _advance(run, stop)


def _advance(run: Run, stop: Stop) -> None:
    """Make the updates that are left, or those until a signal comes."""
    c, state, step = run.config, run.state, run.start
    with ExitStack() as stack:
        stack.callback(run.checkpoints.close)
        reporter = stack.enter_context(reporter_of(run))
        profiler = stack.enter_context(Profiler(run))
        evaluate = Evaluator(run, reporter, stop)
        meter = Meter(run, reporter)
        if step:
            evaluate(step, state)  # what a signal left out
        batches: Any = train_batches(run.corpus, c.data, c.train.seed, step, jax.process_index(), jax.process_count())
        stack.callback(batches.close)

        def save(loss: float | None = None) -> None:
            reporter.flush()
            run.checkpoints.save(step, state, meta={}, loss=loss)

        meter.begin()
        while step < c.train.steps and not stop():
            profiler(step, state)
            batch = parallel.to_global(meter.waiting(next, batches), run.mesh)
            state, metrics = run.step(state, batch)
            step += 1
            meter(step, metrics)
            saving = step == c.train.steps or divides(c.checkpoint.every, step)
            if saving or evaluate.due(step):
                meter.finish()
                loss = evaluate(step, state)
                if saving:
                    save(loss)
                meter.begin()
        meter.finish()
        if stop():
            save()  # unless this step is saved already
        run.checkpoints.close()
        if step < c.train.steps or evaluate.due(step):
            raise Stopped(f"Stopped by {stop()} and saved at step {step} of {c.train.steps}; the same command goes on.")
    say(finished(run.workdir))


def reporter_of(run: Run) -> Reporter:
    """Make the reporter of a run."""
    c = run.config
    return Reporter(
        run.workdir,
        total_steps=c.train.steps,
        start_step=run.start,
        name=run.workdir.path.rstrip("/").rsplit("/", 1)[-1],
        config=c.to_json(),
        primary=run.workdir.primary,
        wandb=c.train.wandb,
        parameters=sum(p.size for p in jax.tree.leaves(run.state.params)),
    )
