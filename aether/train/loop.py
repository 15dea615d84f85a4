"""The training loop, one for every model and loss."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import jax

from aether import parallel
from aether.config import Config
from aether.data.loader import batch_ids, train_batches, validation_batches
from aether.errors import CheckError, Stopped
from aether.evaluate.metrics import make_scorer
from aether.generate.decode import Decoder
from aether.generate.text import text_stream
from aether.train.flops import flops_per_token, peak_flops
from aether.train.profile import Profiler
from aether.train.report import Reporter, finished
from aether.train.setup import Run, say, start


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


def _advance(run: Run, stop: "Stop") -> None:
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


def divides(every: int, step: int) -> bool:
    """Return whether something that happens `every` steps (0: never) is due after `step`."""
    return every > 0 and step % every == 0


class Stop:
    """Tells whether SIGTERM or Ctrl-C came: calling it names the signal, or returns "".

    Until it is `patient` a signal interrupts at once: nothing is made yet that could be lost. After that the loop looks
    at it, and only a second Ctrl-C interrupts.
    """

    def __init__(self) -> None:
        self.patient = False
        self._seen = ""

    def __call__(self) -> str:
        """Return the name of the signal that came."""
        return self._seen

    def note(self, number: int, frame: Any) -> None:
        """Take a signal."""
        again, self._seen = bool(self._seen), signal.Signals(number).name
        if not self.patient or (again and number == signal.SIGINT):
            raise KeyboardInterrupt
        if jax.process_index() == 0:  # not through sys.stderr, which this may have interrupted in the middle of a write
            with suppress(OSError):
                os.write(2, f"\n{self._seen}: saving at the end of this step\n".encode())


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Note SIGTERM and Ctrl-C instead of dying of them."""
    stop = Stop()
    old = {number: signal.signal(number, stop.note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


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


class Meter:
    """Turns the metrics of steps into lines, on accelerators one step late so that they never wait for the host.

    Adds `tokens_per_second`, `mfu` and `data_wait` (share of the time) over the steps since the line before; pauses for
    evaluations and saves do not count.
    """

    def __init__(self, run: Run, reporter: Reporter):
        self.run, self.reporter = run, reporter
        peak = peak_flops(list(run.mesh.devices.flat))
        self.flops_share = flops_per_token(run.config, run.state.params) / peak if peak else None
        self.late: tuple[int, dict[str, jax.Array]] | None = None
        # On a CPU a step may be done when its call returns: reading late would date it to the step after.
        self.at_once = run.mesh.devices.flat[0].platform == "cpu"

    def begin(self) -> None:
        """Start the clock, at first or after a pause."""
        self.clock, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def waiting(self, function: Callable, *args: Any) -> Any:
        """Call a function and count its time as waiting for data."""
        begin = time.perf_counter()
        result = function(*args)
        self.waited += time.perf_counter() - begin
        return result

    def __call__(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Take the metrics of a step, and report those of the step before."""
        self.finish()
        self.late = step, metrics
        if self.at_once:
            self.finish()

    def finish(self) -> None:
        """Report what is still late."""
        if self.late is None:
            return
        (step, metrics), self.late = self.late, None
        self.steps += 1
        in_a_row = int(metrics["skipped_in_a_row"])
        every, last = self.run.config.train.log_every, self.run.config.train.steps
        if in_a_row or step == last or divides(every, step):
            self._report(step, metrics)
        if in_a_row:
            self._complain(step, in_a_row)

    def _report(self, step: int, metrics: dict[str, jax.Array]) -> None:
        values: dict[str, float | None] = {k: v.item() for k, v in jax.device_get(metrics).items()}
        del values["skipped_in_a_row"]
        seconds = time.perf_counter() - self.clock
        rate = self.steps * self.run.config.data.batch_size * self.run.config.data.context / seconds
        mfu = None if self.flops_share is None else rate * self.flops_share
        values |= dict(tokens_per_second=rate, mfu=mfu, data_wait=self.waited / seconds)
        self.reporter.train(step, values)
        self.begin()

    def _complain(self, step: int, in_a_row: int) -> None:
        c = self.run.config
        self.reporter.say(f"step {step}: the loss or gradient is not finite; update skipped ({in_a_row} in a row)")
        if in_a_row < c.train.max_skipped:
            return
        self.reporter.flush()
        steps = range(step - in_a_row, step)
        ids = [f"step {s + 1}: {named(batch_ids(self.run.corpus, c.data, c.train.seed, s))}" for s in steps]
        raise CheckError(
            f"{in_a_row} steps in a row were not finite (train.max_skipped is {c.train.max_skipped}); lower "
            f"optim.learning_rate or look at these batches (text:sequence): {'; '.join(ids)}."
        )


def named(ids: list[str], most: int = 16) -> str:
    """Put the first few names in a row."""
    return " ".join(ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")


@dataclass
class Evaluator:
    """Scores the validation sets, shows a sample, and draws the curves; a signal cuts it short."""

    run: Run
    reporter: Reporter
    stop: Stop

    def __post_init__(self) -> None:
        run = self.run
        self.score = make_scorer(run.graph, run.loss, run.corpus.tokenizer.token_bytes, run.mesh)
        tokenizer = run.corpus.tokenizer
        self.decoder = Decoder(
            run.graph,
            run.config.data.context,
            tokenizer.eot,
            tokenizer.vocab_size,
            run.mesh if jax.process_count() > 1 else None,
        )

    def due(self, step: int) -> bool:
        """Return whether an evaluation belongs after `step` and is not written down yet."""
        train = self.run.config.train
        wanted = step == train.steps or divides(train.eval_every, step)
        return wanted and not all(self.reporter.has(step, name) for name in self.run.corpus.validation)

    def __call__(self, step: int, state: Any) -> float | None:
        """Evaluate the (averaged) parameters if that is due; return the loss on the first validation set.

        Sets that a signal leaves out are due again when the run goes on.
        """
        if not self.due(step):
            return None
        c, run = self.run.config, self.run
        params = state.params if state.ema is None else state.ema
        losses = []
        for name in [n for n in run.corpus.validation if not self.reporter.has(step, n)]:
            batches = validation_batches(
                run.corpus, c.data, name, c.train.eval_batches, jax.process_index(), jax.process_count()
            )
            scores = self.score(params, takewhile(lambda _: not self.stop(), batches))
            if self.stop():
                return None
            losses.append(scores["loss"])
            self.reporter.validation(step, name, scores)
        if c.train.sample_tokens:
            self.reporter.sample(step, self.sample(params))
        self.reporter.curves()
        return losses[0]

    def sample(self, params: Any) -> str:
        """Return `train.sample_prompt` and what the model writes after it."""
        c, tokenizer = self.run.config.train, self.run.corpus.tokenizer
        settings = dict(temperature=0.8, seed=c.seed)
        pieces = text_stream(self.decoder, params, tokenizer, c.sample_prompt, c.sample_tokens, **settings)
        return c.sample_prompt + "".join(takewhile(lambda _: not self.stop(), pieces))
