"""Decoding with a key/value cache: prefill, then a loop on the device that makes several tokens a call.

Axes: b rows (samples), t position, v vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from aether.generate.sample import sample
from aether.nn import KVCache

CHUNK = 16  # most tokens made by one call to the device


class Decoder:
    """Continues prompts with one model, whose parameters each call brings along.

    A document begins with end of text, so each prompt does. A row's draws depend on (seed, row, token) alone. Prompts
    are padded to powers of two, so that few shapes are compiled. Once `context` tokens are cached, decoding goes on
    from the last context/2 of them, at positions counted from 0 as in training.

    Args:
      graph: of the model, an `aether.models.GPT`.
      context: tokens that the model was trained to see.
      eot: id of end of text.
      vocab: number of ids of the tokenizer; those above, rows that pad the embedding, are never drawn.
      mesh: of the parameters, when they are spread over several processes, which then all decode in step.
    """

    def __init__(self, graph: nnx.GraphDef, context: int, eot: int, vocab: int, mesh: Mesh | None = None):
        self.graph, self.context, self.eot, self.vocab = graph, context, eot, vocab
        whole = NamedSharding(mesh, P()) if mesh else None
        self._prefill = jax.jit(self._fill)
        self._decode = jax.jit(self._loop, donate_argnums=1, out_shardings=(None, whole, whole, whole))

    def stream(
        self,
        params: Any,
        prompt: np.ndarray,
        max_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        num: int = 1,
    ) -> Iterator[np.ndarray]:
        """Yield the ids of `num` continuations token by token, (num,) int32, until all of them ended.

        Args:
          params: of the model.
          prompt: ids without the end of text at the front; may be empty.
          max_tokens: longest continuation.
          temperature: see `sample`, as for the next two.
          top_k: the k likeliest ids only.
          top_p: the nucleus only.
          seed: of the draws.
          num: rows; one that drew end of text yields -1 from there on.
        """
        ids = np.tile(np.append(self.eot, prompt).astype(np.int32), (num, 1))
        alive: Any = np.ones(num, bool)
        last, room, cache = ids[:, -1], 0, None
        made = 0
        while made < max_tokens:
            if room == 0:
                ids = self._window(ids)
                cache, last = self.prefill(params, ids[:, :-1]), ids[:, -1]
                room = self.context - ids.shape[1] + 1
            limit = min(CHUNK, made + 1, room, max_tokens - made)  # few at first: they show at once
            settings = dict(temperature=temperature, top_k=top_k, top_p=top_p)
            cache, last, alive, out = self._decode(params, cache, last, alive, seed, made, limit, settings)
            for row in np.asarray(out)[:limit]:
                if (row < 0).all():
                    return
                yield row
            ids = np.concatenate([ids, np.asarray(out)[:limit].T], 1)
            made, room = made + limit, room - limit

    def prefill(self, params: Any, ids: np.ndarray) -> KVCache:
        """Return a cache of `context` positions that holds ids (b, n), n < context; n may be 0."""
        b, n = ids.shape
        size = min(1 << max(n - 1, 0).bit_length(), self.context)
        padded = np.full((b, size), self.eot, np.int32)
        padded[:, :n] = ids
        return self._prefill(params, padded, n)

    def _window(self, ids: np.ndarray) -> np.ndarray:
        """Return the ids that the model goes on from; rows that ended have something harmless in the place of -1."""
        if ids.shape[1] > self.context:
            ids = ids[:, -max(self.context // 2, 1) :]
        return np.where(ids < 0, self.eot, ids)

    def _fill(self, params: Any, ids: Array, n: Array) -> KVCache:
        """Cache the first n of ids (b, t): what stands behind them is masked until it is overwritten."""
        model = nnx.merge(self.graph, params)
        _, cache = model(ids, cache=model.init_cache(ids.shape[0], self.context))
        return cache._replace(length=jnp.full_like(cache.length, n))

    def _loop(
        self,
        params: Any,
        cache: KVCache,
        last: Array,
        alive: Array,
        seed: Array,
        made: Array,
        limit: Array,
        settings: dict[str, Array],
    ) -> tuple[KVCache, Array, Array, Array]:
        """Make up to `limit` ids a row, until all rows ended; returns cache, last ids, alive and the ids (CHUNK, b)."""
        model = nnx.merge(self.graph, params)
        rows = jnp.arange(last.shape[0])

        def going(carry: tuple) -> Array:
            i, _, _, alive, _ = carry
            return (i < limit) & jnp.any(alive)

        def step(carry: tuple) -> tuple:
            i, cache, last, alive, out = carry
            hidden, cache = model(last[:, None], cache=cache)
            logits = model.logits(hidden)[:, 0, : self.vocab]
            keys = jax.vmap(lambda row: _key(seed, row, made + i))(rows)
            last = sample(logits, keys, **settings)
            alive = alive & (last != self.eot)
            out = out.at[i].set(jnp.where(alive, last, -1))
            return i + 1, cache, last, alive, out

        out = jnp.full((CHUNK, last.shape[0]), -1, jnp.int32)
        _, cache, last, alive, out = jax.lax.while_loop(going, step, (0, cache, last, alive, out))
        return cache, last, alive, out


def _key(seed: Array, row: Array, token: Array) -> Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), token)
