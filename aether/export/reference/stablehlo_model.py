"""A network that Aether trained, for any machine: how to run it. Needs this folder, jax, flatbuffers and numpy.

network = load("."); logits = network(tokens)      # (b, t) ids -> (b, t, vocab)
network = load("."); logits = network(images)      # (b, h, w, channels), (pixels/255 - mean)/std -> (b, classes)
ids = network.generate(tokens, 20)                 # of a language model: the likeliest, token by token

forward.bin and decode.bin hold StableHLO as jax.export writes it, for CPUs, NVIDIA GPUs and TPUs: programs, and nothing
that is run by Python. The parameters are their first argument, in the dtype of the file; they compute in float32. JAX
promises to read what it has exported for six months.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export

Cache = dict[str, Array]  # key and value (layers, b, context, heads, k), and length (), how many positions they hold


def load(folder: str) -> "Network":
    """Return the network of an export."""
    return Network(Path(folder))


class Network:
    """The programs of a folder and their parameters; logits of b ≥ 1 rows of any length up to the context."""

    def __init__(self, folder: Path):
        self.facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))["network"]
        with np.load(folder / "parameters.npz", allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        self.parameters = {  # bfloat16, for which npz has no name, is written as uint16
            name: jnp.asarray(a.view(jnp.bfloat16) if a.dtype == np.uint16 else a) for name, a in arrays.items()
        }
        self._forward = jax.jit(_program(folder / "forward.bin").call)
        if (folder / "decode.bin").exists():
            self._decode = jax.jit(_program(folder / "decode.bin").call, donate_argnums=2)

    def __call__(self, inputs: Any) -> Array:
        """Return float32 logits of ids or images."""
        return self._forward(self.parameters, self._checked(inputs))

    def init_cache(self, rows: int) -> Cache:
        """Return what `decode` knows before the first position."""
        f = self.facts
        zeros = jnp.zeros((f["layers"], rows, f["context"], f["heads"], f["width"] // f["heads"]))
        return dict(key=zeros, value=zeros + 0, length=jnp.zeros((), jnp.int32))

    def decode(self, tokens: Any, cache: Cache) -> tuple[Array, Cache]:
        """Return the logits (b, t, vocab) of the next t tokens, a whole prompt or one, and the cache with them in it.

        The cache that is given is used up. It has room for `context` positions, and does not notice when it is full.
        """
        return self._decode(self.parameters, self._checked(tokens), cache)

    def generate(self, tokens: Any, count: int) -> np.ndarray:
        """Continue tokens (b, t) by the likeliest ones, (b, count); t + count is at most `context` + 1."""
        room = self.facts["context"] + 1 - np.shape(tokens)[1]
        if count > room:
            raise ValueError(f"count is {count}; there is room for {room} tokens behind these.")
        cache, found = self.init_cache(len(tokens)), []
        for _ in range(count):
            logits, cache = self.decode(tokens, cache)
            tokens = jnp.argmax(logits[:, -1:], -1).astype(jnp.int32)
            found.append(np.asarray(tokens))
        return np.concatenate(found, 1)

    def _checked(self, inputs: Any) -> Array:
        if "context" in self.facts and np.shape(inputs)[1] > self.facts["context"]:
            raise ValueError(f"tokens are {np.shape(inputs)}; a row has at most {self.facts['context']}.")
        return jnp.asarray(inputs)


def _program(file: Path) -> export.Exported:
    return export.deserialize(bytearray(file.read_bytes()))
