"""To StableHLO: Aether's own network as programs of jax.export, which run without any code of it.

A program takes its parameters as arguments, and any number of rows and positions, on each of `PLATFORMS`. Attention
holds whole score matrices: kernels are for one platform each, and blockwise attention has to know the length. There is
no loop over the network's blocks, which would first have to copy their parameters into one array.
"""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, export

from aether.config import Config, build
from aether.export.bundle import portable, state_of
from aether.export.npz import write_parameters
from aether.export.source import Source, Target
from aether.models import describe_model
from aether.nn import KVCache

PLATFORMS = ("cpu", "cuda", "tpu")
_PROGRAMS = Path(__file__).parent / "reference" / "stablehlo_model.py"


def write(source: Source, folder: Path) -> None:
    """Write parameters and programs, and how to run them."""
    write_parameters(source, folder)
    shutil.copy(_PROGRAMS, folder / _PROGRAMS.name)
    config = portable(build(source.record["config"]))
    parameters = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in source.parameters.items()}
    programs = [forward_program(config, parameters)]
    if config.model.task == "lm":
        programs.append(decode_program(config, parameters))
    for name, program in zip(("forward", "decode"), programs, strict=False):
        (folder / f"{name}.bin").write_bytes(program.serialize())


def replay(folder: Path, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the logits of each batch; of a language model every second by a cache, the last position after the rest."""
    from aether.export.reference import stablehlo_model

    network = stablehlo_model.load(str(folder))
    for k, x in enumerate(batches):
        if network.facts["family"] == "gpt" and k % 2:
            first, cache = network.decode(x[:, :-1], network.init_cache(len(x)))
            yield np.concatenate([first, network.decode(x[:, -1:], cache)[0]], 1)
        else:
            yield np.asarray(network(x))


def forward_program(config: Config, parameters: dict[str, Any]) -> export.Exported:
    """Export logits(parameters, inputs): ids (b, t), or images."""
    build_model = _builder(config)

    def forward(parameters: dict[str, Array], inputs: Array) -> Array:
        model, task = build_model(parameters), config.model.task
        hidden = model(inputs)
        return hidden if task == "classify" else model.logits(hidden[0] if task == "lm" else hidden)

    if config.model.task == "classify":
        i = config.image
        (b,) = export.symbolic_shape("b")
        return _exported(forward, parameters, jax.ShapeDtypeStruct((b, i.size, i.size, i.channels), jnp.float32))
    return _exported(forward, parameters, jax.ShapeDtypeStruct(_rows_and_positions(config), jnp.int32))


def decode_program(config: Config, parameters: dict[str, Any]) -> export.Exported:
    """Export logits, cache (parameters, ids (b, t), cache), the cache of `config.data.context` positions."""
    build_model, m = _builder(config), config.model
    b, t = _rows_and_positions(config)
    held = jax.ShapeDtypeStruct((m.layers, b, config.data.context, m.heads, m.width // m.heads), jnp.float32)
    cache = dict(key=held, value=held, length=jax.ShapeDtypeStruct((), jnp.int32))

    def decode(parameters: dict[str, Array], ids: Array, cache: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        model = build_model(parameters)
        lengths = jnp.broadcast_to(cache["length"], (m.layers,))
        hidden, after = model(ids, cache=KVCache(cache["key"], cache["value"], lengths))
        return model.logits(hidden), dict(key=after.key, value=after.value, length=after.length[0])

    return _exported(decode, parameters, jax.ShapeDtypeStruct((b, t), jnp.int32), cache)


def _builder(config: Config) -> Any:
    """Return network(parameters by name), to be called where they are traced."""
    graph, *shapes = describe_model(config)
    like = nnx.merge_state(*shapes)
    return lambda parameters: nnx.merge(graph, state_of(config, like, parameters, jnp))


def _rows_and_positions(config: Config) -> tuple[Any, ...]:
    return tuple(export.symbolic_shape("b, t", constraints=[f"t <= {config.data.context}"]))


def _exported(program: Any, *args: Any) -> export.Exported:
    with jax.default_matmul_precision("highest"):
        return export.export(jax.jit(program), platforms=PLATFORMS)(*args)


TARGET = Target(
    "StableHLO programs of jax.export",
    write,
    replay,
    use='from stablehlo_model import load\n\nnetwork = load(".")\nlogits = network(inputs)',
    packages=("flatbuffers",),
    extra="stablehlo",
    environment={"JAX_PLATFORMS": "cpu"},
)
