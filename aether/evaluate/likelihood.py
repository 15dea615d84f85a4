"""The likelihood of token sequences under a run's model, on its whole mesh, batched by length.

Axes: b rows, t position.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from aether.evaluate.load import Run
from aether.evaluate.requests import Request
from aether.losses import token_scores
from aether.parallel import ROWS, local_rows, to_global

SHORTEST = 32  # the length below which padding is cheaper than one more shape to compile


class Score(NamedTuple):
    """The log-probability in nats of a request's scored ids, and whether each of them is the likeliest at its place."""

    log_p: float
    greedy: bool


class Batch(NamedTuple):
    """Requests, by number, that are scored together: so many `rows` of `length` positions."""

    members: list[int]
    rows: int
    length: int


class Scorer:
    """Scores requests with the model of one run; what was compiled is kept from call to call.

    Batches hold as many tokens as a microbatch of the training. Their lengths are halves of halves of the context, so
    that few shapes are compiled. Of several processes all call it, with the same requests, and all get all scores.

    Args:
      run: of a language model.
    """

    def __init__(self, run: Run):
        self.run, c = run, run.config
        self.context = c.data.context
        self.tokens = c.data.batch_size // c.train.accumulate * c.data.context
        self.ways = math.prod(run.mesh.shape[a] for a in ROWS)
        self.lengths = _lengths(c.data.context, run.mesh.shape["sequence"])
        self._score = jax.jit(self._batch_scores, out_shardings=NamedSharding(run.mesh, P()))

    def __call__(self, requests: Sequence[Request], name: str = "") -> list[Score]:
        """Return the scores in the order of the requests; those that are equal are computed once.

        Args:
          requests: of at most context + 1 ids.
          name: shown with the progress, on a terminal.
        """
        unique: dict[tuple[bytes, int], int] = {}
        places = [unique.setdefault((r.ids.tobytes(), r.scored), len(unique)) for r in requests]
        wanted: dict[int, Request] = {}
        for place, request in zip(places, requests, strict=True):
            wanted.setdefault(place, request)
        found = self._scored(list(wanted.values()), name)
        return [found[place] for place in places]

    def batches(self, requests: Sequence[Request]) -> list[Batch]:
        """Divide requests into batches, the longest first, so that memory runs out at once or never."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].ids))
        batches, begin = [], 0
        while begin < len(order):
            length = min(n for n in self.lengths if n >= len(requests[order[begin]].ids) - 1)
            rows = self._rows(self.tokens // length, len(order) - begin)
            batches.append(Batch(order[begin : begin + rows], rows, length))
            begin += rows
        return batches

    def _rows(self, fitting: int, left: int) -> int:
        """Return the rows of a batch: those that fit, or, where fewer are left, a power of two; times the mesh's."""
        most = -(-max(fitting, 1) // self.ways)
        return self.ways * min(most, 1 << (-(-left // self.ways) - 1).bit_length())

    def _scored(self, requests: list[Request], name: str) -> list[Score]:
        scores: list[Score] = [Score(math.nan, False)] * len(requests)

        def note(batch: Batch, found: tuple[jax.Array, jax.Array]) -> None:
            for i, log_p, greedy in zip(batch.members, *map(np.ndarray.tolist, jax.device_get(found)), strict=False):
                scores[i] = Score(log_p, greedy)

        last = None
        for batch in self._shown(self.batches(requests), name):
            with jax.set_mesh(self.run.mesh):
                found = self._score(self.run.params, to_global(self._arrays(requests, batch), self.run.mesh))
            if last is not None:
                note(*last)  # one batch late, so that the device never waits for this host
            last = batch, found
        if last is not None:
            note(*last)
        return scores

    def _shown(self, batches: list[Batch], name: str) -> Iterator[Batch]:
        hidden = not sys.stderr.isatty() or jax.process_index() > 0
        yield from tqdm(batches, desc=name, unit="batch", file=sys.stderr, disable=hidden)

    def _arrays(self, requests: list[Request], batch: Batch) -> dict[str, np.ndarray]:
        """Return this process's rows: inputs and targets, padded at the right, and which targets are scored."""
        mine = local_rows(self.run.mesh, batch.rows)
        tokens, targets = np.zeros((2, len(mine), batch.length), np.int32)
        begin, end = np.zeros((2, len(mine)), np.int32)
        for k, row in enumerate(mine):
            if row < len(batch.members):
                request = requests[batch.members[row]]
                n = len(request.ids) - 1
                tokens[k, :n], targets[k, :n] = request.ids[:-1], request.ids[1:]
                begin[k], end[k] = n - request.scored, n
        return dict(tokens=tokens, targets=targets, begin=begin, end=end)

    def _batch_scores(self, params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Return log p (b,) and greedy (b,)."""
        model: Any = nnx.merge(self.run.graph, params)
        hidden, _ = model(batch["tokens"])
        kernel = model.head_kernel().astype(hidden.dtype)
        chunk = self.run.config.train.loss_chunk
        log_p, likeliest = token_scores(chunk, model.vocab, hidden, kernel, batch["targets"])
        at = jnp.arange(log_p.shape[1])
        scored = (at >= batch["begin"][:, None]) & (at < batch["end"][:, None])
        return jnp.sum(jnp.where(scored, log_p, 0.0), 1), jnp.all(likeliest | ~scored, 1)


def _lengths(context: int, ways: int) -> list[int]:
    """Return the lengths of batches, which `ways` divides, longest first: the context and its halves' halves."""
    lengths = [context]
    while lengths[-1] > SHORTEST:
        shorter = -(-lengths[-1] // (2 * ways)) * ways
        if shorter == lengths[-1]:
            break
        lengths.append(shorter)
    return lengths
