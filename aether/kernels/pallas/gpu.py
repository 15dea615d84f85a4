"""Flash attention for NVIDIA GPUs in Pallas, forward and backward, with every ⵟ score and every structured mask.

On Triton, though jax 0.11 calls it deprecated: Mosaic GPU multiplies float32 as TF32 only and needs Hopper.

The forward pass keeps a running level, sum and weighted mean a query; the backward pass is one kernel for the gradients
of queries, b, α and ε and another for those of keys and values, each of which makes the scores again, so that no two
programs add to the same memory. Ideas: Dao et al., 2022, arXiv 2205.14135; Milakov and Gimelshein, 2018. Axes: as in
`aether.kernels.blockwise`.
"""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from aether.kernels.masks import Mask
from aether.kernels.normalization import Normalization
from aether.kernels.pallas import gpu_kernels as kernels
from aether.kernels.pallas.device import device
from aether.kernels.pallas.gpu_tile import Form
from aether.kernels.pallas.tile import form_of, of_numbers
from aether.kernels.scores import Score, YatScore

WIDTHS = (32, 64, 128)


class Tile(NamedTuple):
    """Queries and keys in a block, warps of a program, and blocks that are on their way at once."""

    rows: int
    columns: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """One for each kernel."""

    forward: Tile
    of_queries: Tile
    of_keys: Tile


# By head width and bytes of an entry. None was timed: of the sizes tried, those whose inner loops ptxas compiles to the
# fewest instructions a score without spilled registers. Hopper's take up to 160 KiB of shared memory, the others' 64.
_HOPPER = {
    (32, 2): Tiles(Tile(128, 128, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    (64, 2): Tiles(Tile(128, 128, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    (128, 2): Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
}
_OTHERS = {
    (32, 2): Tiles(Tile(128, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)),
    (64, 2): Tiles(Tile(128, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)),
    (128, 2): Tiles(Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)),
    (32, 4): Tiles(*[Tile(32, 32, 4, 2)] * 3),
    (64, 4): Tiles(*[Tile(32, 32, 8, 2)] * 3),
    (128, 4): Tiles(*[Tile(16, 16, 4, 2)] * 3),
}
_BEFORE_AMPERE = re.compile(r"\b[KMPTV]\d|RTX 20[678]0|GTX|Quadro|TITAN")  # Triton compiles no bfloat16 for them
_LARGE = ("H100", "H200", "B200", "B300")  # names of devices with 227 KiB of shared memory a program


def tiles_of(kind: str, width: int, itemsize: int, squares: bool) -> Tiles:
    """Return the tiles on a kind of device; `squares` if scores need ‖q‖² and ‖k‖²."""
    key, large = (width, itemsize), any(name in kind for name in _LARGE)
    tiles = _HOPPER[key] if large and key in _HOPPER else _OTHERS[key]
    if squares and large and key == (128, 2):  # too many registers for the larger one
        tiles = tiles._replace(of_keys=Tile(32, 128, 8, 2))
    return tiles


def unsupported(q: Array, k: Array, v: Array) -> str:
    """Return "" if there is a kernel for such operands, on this device, else what it does not do, as one clause."""
    platform, kind = device()
    if platform == "gpu" and (not kind.startswith("NVIDIA") or _BEFORE_AMPERE.search(kind)):
        return f"{kind}, only NVIDIA GPUs from Ampere on"
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"{q.dtype}"
    if q.shape[-1] not in WIDTHS:
        return f"heads of width {q.shape[-1]}"
    if v.shape[-1] != q.shape[-1]:
        return f"values of another width, {v.shape[-1]}"
    return ""


def forward(
    q: Array, k: Array, v: Array, score: Score, mask: Mask, normalization: Normalization, *, interpret: bool = False
) -> tuple[Array, Array]:
    """Return y (b, g, r, t, k) and the final level of each query (b, g, r, t, 1), float32, as that of `tpu.forward`."""
    tile = _tiles(q, score).forward
    f = _form(q, k, score, mask, normalization, tile, interpret)
    arrays = _arrays(f, q, k, v, score, mask, normalization)
    shape = arrays["q"].shape
    outputs = {"y": jax.ShapeDtypeStruct(shape, v.dtype), "level": jax.ShapeDtypeStruct(shape[:-1], jnp.float32)}
    y, level = _call(kernels.forward, f, arrays, outputs, tile, 1)
    return y.reshape(q.shape), level.reshape(*q.shape[:-1], 1)


def backward(
    q: Array,
    k: Array,
    v: Array,
    score: Score,
    mask: Mask,
    normalization: Normalization,
    level: Array,
    centre: Array,
    g: Array,
    *,
    interpret: bool = False,
) -> tuple[Array, Array, Array, Any]:
    """Return the gradients of q, k, v and of the score's b, α and ε, for the level, Σ g·y a query, and g = dL/dy."""
    level = -level if normalization.name == "softmax" else 1.0 / level
    _, of_queries, of_keys = _tiles(q, score)
    f = _form(q, k, score, mask, normalization, of_queries, interpret)
    arrays = _arrays(f, q, k, v, score, mask, normalization)
    shape = arrays["q"].shape
    arrays |= {"g": g.reshape(shape), "level": level.reshape(shape[:-1]), "centre": centre.reshape(shape[:-1])}
    outputs = {"dq": jax.ShapeDtypeStruct(shape, q.dtype)}
    if f.yat:
        blocks = math.ceil(f.queries / f.rows)
        outputs["sums"] = jax.ShapeDtypeStruct((*shape[:2], blocks, 4), jnp.float32)
    dq, *sums = _call(kernels.of_queries, f, arrays, outputs, of_queries, 1)
    f = replace(f, rows=of_keys.rows, columns=of_keys.columns)
    outputs = {"dk": jax.ShapeDtypeStruct(k.shape, k.dtype), "dv": jax.ShapeDtypeStruct(v.shape, v.dtype)}
    dk, dv = _call(kernels.of_keys, f, arrays, outputs, of_keys, q.shape[2])
    if isinstance(score, YatScore):
        bias, alpha, epsilon, _ = jnp.sum(sums[0], (0, 2)).T
        score = of_numbers(score, bias, alpha / math.sqrt(q.shape[-1]), epsilon)
    return dq.reshape(q.shape), dk, dv, score


def _form(
    q: Array, k: Array, score: Score, mask: Mask, normalization: Normalization, tile: Tile, interpret: bool
) -> Form:
    return Form(
        **vars(form_of(score, normalization.name == "softmax", q.dtype)),
        causal=mask.causal,
        window=mask.window,
        queries=q.shape[-2],
        keys=k.shape[-2],
        rows=tile.rows,
        columns=tile.columns,
        interpret=interpret,
    )


def _arrays(
    f: Form, q: Array, k: Array, v: Array, score: Score, mask: Mask, normalization: Normalization
) -> dict[str, Array]:
    """Return what the kernels read, by name; the two axes of heads of queries are one."""
    q = q.reshape(q.shape[0], -1, *q.shape[3:])
    root = math.sqrt(q.shape[-1])
    numbers: tuple[Any, ...] = (0.0, 1.0 / root, 1.0)
    if isinstance(score, YatScore):
        numbers = score.bias, score.alpha / root, score.epsilon
    by_head = [
        jnp.broadcast_to(jnp.asarray(n, jnp.float32).reshape(-1), q.shape[1:2])
        for n in (*numbers, normalization.constant)
    ]
    arrays = {"q": q, "k": k, "v": v, "numbers": jnp.stack(by_head, 1)}
    if f.squares:
        arrays |= {f"{n}_square": jnp.sum(jnp.square(x.astype(jnp.float32)), -1) for n, x in (("q", q), ("k", k))}
    if f.causal or f.window is not None:
        arrays["offset"] = jnp.asarray(mask.offset, jnp.int32).reshape(1)
    for name in ("query_segments", "key_segments", "valid"):
        if getattr(mask, name) is not None:
            arrays[name] = getattr(mask, name).astype(jnp.int32)
    return arrays


def _call(
    kernel: Callable[..., None],
    f: Form,
    arrays: dict[str, Array],
    outputs: dict[str, jax.ShapeDtypeStruct],
    tile: Tile,
    heads: int,
) -> list[Array]:
    """Run a program for each block of the first output's rows, each `heads` query heads, and each row of the batch."""
    h, g = arrays["q"].shape[1], arrays["k"].shape[1]

    def spec(name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        rest = (0,) * (len(shape) - 2)
        if name in ("k", "v", "k_square", "dk", "dv"):
            return pl.BlockSpec((None, None, *shape[2:]), lambda i, a, b: (b, a * heads // (h // g), *rest))
        if name == "numbers":
            return pl.BlockSpec((heads, 4), lambda i, a, b: (a, 0))
        if name == "offset":
            return pl.BlockSpec((1,), lambda i, a, b: (0,))
        if name == "sums":
            return pl.BlockSpec((None, None, None, 4), lambda i, a, b: (b, a, i, 0))
        if name in ("query_segments", "key_segments", "valid"):
            return pl.BlockSpec((None, shape[1]), lambda i, a, b: (b, 0))
        return pl.BlockSpec((None, heads, *shape[2:]), lambda i, a, b: (b, a, *rest))

    length, size = (f.keys, f.columns) if "dk" in outputs else (f.queries, f.rows)
    run = pl.pallas_call(
        partial(kernel, f),
        grid=(math.ceil(length / size), h // heads, arrays["q"].shape[0]),
        in_specs=[{name: spec(name, x.shape) for name, x in arrays.items()}],
        out_specs=[spec(name, x.shape) for name, x in outputs.items()],
        out_shape=list(outputs.values()),
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=f.interpret,
        name=kernel.__name__,
    )
    return run(arrays)


def _tiles(q: Array, score: Score) -> Tiles:
    squares = isinstance(score, YatScore) and not score.spherical
    return tiles_of(device().kind, q.shape[-1], q.dtype.itemsize, squares)
