"""Evaluation during a run."""

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from aether.data.loader import evaluation_batches
from aether.generate.decode import Decoder
from aether.generate.text import text_stream
from aether.parallel import local_rows
from aether.train.meter import divides
from aether.train.report import Reporter
from aether.train.setup import Run
from aether.train.signals import Stop


@dataclass
class Evaluator:
    """Scores the validation sets, shows a sample, and draws the curves; a signal cuts it short."""

    run: Run
    reporter: Reporter
    stop: Stop

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
        losses = []
        for name in [n for n in run.corpus.validation if not self.reporter.has(step, n)]:
            rows = local_rows(run.mesh, c.data.batch_size).tolist()
            batches = evaluation_batches(run.corpus.validation[name], c.data, c.train.eval_batches, rows)
            scores = self.run.score(state.variables, takewhile(self.stop.every_few(), batches))
            if self.stop():
                return None
            losses.append(scores["loss"])
            self.reporter.validation(step, name, scores)
        if c.train.sample_tokens and run.decoder is not None:
            self.reporter.sample(step, self.sample(run.decoder, state.variables))
        self.reporter.curves()
        return losses[0]

    def sample(self, decoder: Decoder, params: Any) -> str:
        """Return `train.sample_prompt` and what the model writes after it."""
        c, tokenizer = self.run.config.train, self.run.corpus.tokenizer
        assert tokenizer is not None
        settings = dict(temperature=0.8, seed=c.seed)
        pieces = text_stream(decoder, params, tokenizer, c.sample_prompt, c.sample_tokens, **settings)
        return c.sample_prompt + "".join(takewhile(self.stop.every_few(), pieces))
