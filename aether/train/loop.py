"""The training loop, one for every model and loss."""

import gc
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial

import jax

from aether import parallel, processes
from aether.config import Config
from aether.data.loader import train_batches
from aether.errors import Stopped
from aether.train import agree
from aether.train.activity import STEPS
from aether.train.evaluator import Evaluator
from aether.train.meter import Meter, divides
from aether.train.profile import Profiler
from aether.train.report import Reporter, finished
from aether.train.setup import Run, say, start
from aether.train.signals import Stop, stop_signals
from aether.train.spikes import Rewind
from aether.train.telemetry import Telemetry


def train(config: Config, workdir: str, *, started: float | None = None) -> bool:
    """Train from the config, or go on with the run in `workdir`, until `train.steps` updates are made.

    Returns whether anything was left to do.

    Args:
      config: as built, not resolved.
      workdir: a folder, or gs:// or s3://.
      started: `time.perf_counter()` when the process began, for the times of the start-up.

    Raises:
      Stopped: a signal came; everything is saved.
      CheckError: too many steps in a row without an update, or too many rewinds.
    """
    with stop_signals() as stop, ExitStack() as held:
        try:
            processes.start(config, workdir)
            stop.begin()
            run = start(config, workdir, time.perf_counter() if started is None else started, held)
            stop.patient = True
        except KeyboardInterrupt:
            raise Stopped(
                f"Stopped by {stop.seen} during the start, so nothing is lost; the same command goes on."
            ) from None
        if run is None:
            return False
        with closing(run.guard):
            while back := _until_spike(run, stop):
                run = _gone_back(run, *back)
        say(f"{finished(run.workdir)}\n{run.guard.goodput()}")
        return True


def _until_spike(run: Run, stop: Stop) -> tuple[int, int] | None:
    """Make the updates that are left; return the step of a spike and the checkpoint to go back to, if there is one."""
    try:
        _advance(run, stop)
    except Rewind as rewind:
        return rewind.step, rewind.target
    return None


def _gone_back(run: Run, spike: int, target: int) -> Run:
    """Return the run as it was at the checkpoint `target`, with the batches from there to the spike left out."""
    gc.collect()  # the frames of what was raised hold the state of the spike
    with run.guard.activity("restore"):  # first: newer ones may be all there is
        state, _, target = run.checkpoints.restore(run.like, at_most=target)
    left_out = run.left_out.extended(target, spike)
    run.checkpoints.drop_after(target)  # before the record: a checkpoint of the steps to be undone knows other batches
    left_out.save(run.workdir)
    run.guard.activity.back_to(target)
    first, last = run.left_out.batch(target), run.left_out.batch(spike - 1)
    say(f"gone back from step {spike} to {target}; batches {first + 1} to {last + 1} are left out")
    return replace(run, state=state, start=target, left_out=left_out)


def _advance(run: Run, stop: Stop) -> None:
    """Make the updates that are left, or those until a signal comes."""
    c, state, step = run.config, run.state, run.start
    with ExitStack() as stack:
        stack.callback(run.checkpoints.close)
        reporter = stack.enter_context(reporter_of(run))
        profiler = stack.enter_context(Profiler(run))
        evaluate = Evaluator(run, reporter, stop)
        meter = Meter(run, reporter, stop)
        telemetry = Telemetry(run, reporter)
        if step:
            with run.guard.activity("evaluation"):
                evaluate(step, state)  # what a signal left out
        rows = parallel.local_rows(run.mesh, c.data.batch_size).tolist()
        read = partial(train_batches, run.corpus.train, c.data, c.train.seed, rows=rows)
        batches = run.left_out.batches(read, step)
        stack.callback(batches.close)

        def save(loss: float | None = None) -> None:
            with run.guard.activity("checkpoint"):
                reporter.flush()
                run.checkpoints.save(step, state, meta={}, loss=loss)

        run.guard.activity.enter(STEPS)
        meter.begin()
        while step < c.train.steps and not stop():
            profiler(step, state)
            batch = parallel.to_global(meter.waiting(next, batches), run.mesh)
            state, metrics = run.step(state, batch | stop.flags(run.mesh))
            step += 1
            telemetry(step, state, batch)
            meter(step, metrics)
            saving = step == c.train.steps or divides(c.checkpoint.every, step)
            if saving or evaluate.due(step):
                telemetry.finish()
                meter.finish()
                with run.guard.activity("evaluation"):
                    loss = evaluate(step, state)
                if saving:
                    save(loss)
                meter.begin()
        telemetry.finish()
        meter.finish()
        if stop():
            save()  # unless this step is saved already
        run.checkpoints.close()
        if step < c.train.steps or evaluate.due(step):
            raise Stopped(f"Stopped by {stop()} and saved at step {step} of {c.train.steps}; the same command goes on.")


def reporter_of(run: Run) -> Reporter:
    """Make the reporter of a run; all processes know from it what has been evaluated."""
    c, start = run.config, run.start
    reporter = Reporter(
        run.workdir,
        total_steps=c.train.steps,
        start_step=start,
        name=run.workdir.path.rstrip("/").rsplit("/", 1)[-1],
        config=c.to_json(),
        unit=c.unit,
        per_step=c.per_step,
        primary=run.workdir.primary,
        wandb=c.train.wandb,
        told=run.units is not None,
        parameters=sum(p.size for p in jax.tree.leaves(run.state.params)),
    )
    reporter.tell(start, agree.of_first(lambda: [name for name in run.corpus.validation if reporter.has(start, name)]))
    return reporter
