"""The GPU kernels, interpreted, against NumPy in float64: values, levels, all gradients; and lowered for CUDA."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from aether.kernels.attention import DotScore, YatScore, plain
from aether.kernels.masks import Mask
from aether.kernels.normalization import Normalization
from aether.kernels.pallas import gpu, gpu_kernels, gpu_tile
from aether.testing import equations
from tools import reference as ref

STEP = 1e-30  # of complex differentiation, which nothing rounds
DIRECTIONS = 3
CONSTANT = 0.1  # ε₁ of L1
TOLERANCE = {"float32": 3e-6, "bfloat16": 2e-2}


class Case(NamedTuple):
    """b, g, r, t, s, k; a dot product, or a ⵟ score, plain or spherical; a mask; a normalization; a dtype."""

    sizes: tuple[int, int, int, int, int, int]
    score: str
    mask: dict
    normalization: str = "softmax"
    dtype: str = "float32"


CASES = {
    "causal": Case((1, 2, 2, 150, 150, 32), "plain", dict(causal=True)),
    "cross, wide": Case((1, 1, 2, 17, 101, 128), "plain", dict()),
    "spherical window": Case((2, 1, 1, 150, 150, 64), "spherical", dict(window=40)),
    "dot after a cache": Case((1, 2, 2, 50, 150, 64), "dot", dict(causal=True, offset=77)),
    "segments, padding": Case((2, 1, 2, 97, 97, 32), "spherical", dict(causal=True, segments=True, valid=True)),
    "l1 window after a cache": Case((1, 2, 2, 70, 130, 32), "plain", dict(window=50, offset=40), "l1"),
    "l1 padding": Case((2, 1, 1, 64, 128, 64), "spherical", dict(valid=True), "l1"),
    "bfloat16 window, wide": Case((1, 2, 1, 90, 90, 128), "spherical", dict(window=30), dtype="bfloat16"),
    "bfloat16 l1 segments": Case((2, 1, 2, 80, 80, 32), "plain", dict(segments=True), "l1", "bfloat16"),
}


def make(rng, case):
    """Return q, k, v and a cotangent, the mask, what it shows, and b, α and ε of each head."""
    b, g, r, t, s, k = case.sizes
    shapes = ((b, g, r, t, k), (b, g, s, k), (b, g, s, k), (b, g, r, t, k))
    q, k, v, dy = (rng.normal(size=shape) for shape in shapes)
    if case.score == "spherical":
        k[:, :, : min(t, s)] += q[:, :, 0, : min(t, s)]  # some are close
        q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    told = dict(case.mask)
    offset, window = told.get("offset", 0), told.get("window")
    ahead = np.arange(s) - (offset + np.arange(t))[:, None]
    seen = np.broadcast_to(ahead <= 0 if window or told.get("causal") else True, (b, t, s))
    if window:
        seen = seen & (ahead > -window)
    if told.pop("segments", False):
        segments = np.sort(rng.integers(0, 3, (b, t)), 1)
        told |= dict(query_segments=segments, key_segments=segments)
        seen = seen & (segments[:, :, None] == segments[:, None])
    if told.pop("valid", False):
        valid = rng.random((b, s)) < 0.6
        valid[0, :10] = False
        told["valid"] = valid
        seen = seen & valid[:, None]
    h = np.arange(g * r)
    numbers = (0.3 - 0.2 * h, 2.0 + h, 0.2 + 0.1 * h)
    arrays = [jnp.asarray(x, case.dtype) for x in (q, k, v, dy)]
    mask = Mask(**{n: jnp.asarray(x) if np.ndim(x) or n == "offset" else x for n, x in told.items()})
    return arrays, mask, seen[:, None, None], numbers


def exact(case, seen, q, k, v, bias, alpha, epsilon):
    """Return y and the scores in the precision of the arguments."""
    _, g, r, _, _, width = case.sizes
    dot = np.einsum("bgrtk,bgsk->bgrts", q, k)
    s = dot / math.sqrt(width)
    if case.score != "dot":
        bias, alpha, epsilon = (np.reshape(x, (g, r, 1, 1)) for x in (bias, alpha, epsilon))
        square = np.sum(q * q, -1)[..., None] + np.sum(k * k, -1)[:, :, None, None] if case.score == "plain" else 2.0
        s = alpha * (dot + bias) ** 2 / ((square - 2.0 * dot + epsilon) * math.sqrt(width))
    weights = ref.attention_weights(s, seen, case.normalization, epsilon=CONSTANT)
    return np.einsum("bgrts,bgsk->bgrtk", weights, v), s


@partial(jax.jit, static_argnames="normalization")
def run(q, k, v, dy, score, mask, normalization):
    n = Normalization(normalization, constant=CONSTANT).by_head(*q.shape[1:3])
    assert gpu.unsupported(q, k, v) == ""
    y, level = gpu.forward(q, k, v, score, mask, n, interpret=True)
    return y, level, gpu.backward(q, k, v, score, mask, n, level, centre(dy, y), dy, interpret=True)


def centre(dy, y):
    return jnp.sum(jnp.float32(dy) * jnp.float32(y), -1, keepdims=True)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients(rng, case):
    """Gradients along random directions, which complex steps give in float64; queries without keys give zeros."""
    (q, k, v, dy), mask, seen, numbers = make(rng, case)
    score = DotScore()
    if case.score != "dot":
        score = YatScore(*(jnp.asarray(x, jnp.float32) for x in numbers), spherical=case.score == "spherical")
    y, level, (dq, dk, dv, dscore) = run(q, k, v, dy, score, mask, case.normalization)
    assert y.dtype == dq.dtype == dk.dtype == dv.dtype == case.dtype and level.dtype == "float32"
    args = [*(np.float64(x) for x in (q, k, v)), *numbers]
    right, s = exact(case, seen, *args)
    limit = TOLERANCE[case.dtype]
    np.testing.assert_allclose(np.float64(y), right, atol=limit * np.max(np.abs(right)))
    nothing = ~np.any(np.broadcast_to(seen, s.shape), -1)
    assert np.any(nothing) == ("valid" in case.mask and case.score == "spherical" and "causal" in case.mask)
    assert not np.any(np.float64(y)[nothing]) and not np.any(np.float64(dq)[nothing])
    total = np.sum(np.where(seen, np.exp(s) if case.normalization == "softmax" else s, 0.0), -1)
    levels = np.log2(np.where(nothing, 1.0, total)) if case.normalization == "softmax" else total + CONSTANT
    np.testing.assert_allclose(level[..., 0], levels, rtol=limit, atol=limit)
    gradients = [dq, dk, dv, *jax.tree.leaves(dscore)]
    for name, at, gradient in zip(("q", "k", "v", "b", "alpha", "epsilon"), range(6), gradients, strict=False):
        gradient = np.float64(gradient)
        for _ in range(DIRECTIONS):
            direction = rng.normal(size=gradient.shape)
            moved = [x + 1j * STEP * direction if n == at else x for n, x in enumerate(args)]
            wanted = np.sum(np.float64(dy) * exact(case, seen, *moved)[0].imag) / STEP
            error = abs(np.sum(gradient * direction) - wanted)
            bound = 3 * limit * max(1.0, np.linalg.norm(gradient))
            if name == "alpha" and case.normalization == "l1" and case.dtype == "bfloat16":
                bound = 3 * np.linalg.norm(direction * rounding_of_alpha(case, seen, args, np.float64(dy)))
            assert error <= bound, (name, error, wanted)


def rounding_of_alpha(case, seen, args, dy):
    """By how much rounding moves dL/dα of L1, one a head: 2⁻⁹ √Σ of the squares of its terms.

    dL/dα = Σ w (dL/dy · v − dL/dy · y) / α over all pairs cancels but for the share of ε₁, here 0.5 of terms that sum
    to 500, and w and y are rounded to bfloat16 before. The blockwise form loses as much, float32 operands lose 2e-6.
    """
    y, s = exact(case, seen, *args)
    terms = ref.attention_weights(s, seen, "l1", epsilon=CONSTANT) * np.einsum("bgrtk,bgsk->bgrts", dy, args[2])
    return 2.0**-9 * np.sqrt(sum(np.sum(x * x, (0, 3, 4)).reshape(-1) for x in (terms, dy * y))) / args[4]


def test_the_reference_of_scores_is_the_library_s(rng):
    """The formula above, which takes vectors as they are, agrees with the one by differences."""
    for score in ("plain", "spherical"):
        case = Case((1, 1, 2, 5, 6, 8), score, dict())
        (q, k, v, _), _, seen, numbers = make(rng, case)
        q, k, v = (np.float64(x) for x in (q, k, v))
        options = dict(zip(("bias", "alpha", "epsilon"), numbers, strict=True), spherical=score == "spherical")
        wanted = ref.yat_attention(q[:, 0].swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), **options)
        np.testing.assert_allclose(exact(case, seen, q, k, v, *numbers)[0][:, 0].swapaxes(1, 2), wanted, rtol=1e-5)


def test_close_vectors_have_the_least_distance(rng):
    """Where q = k the distance is the floor's, and has no gradient."""
    x, v, dy = (jnp.asarray(rng.normal(size=(1, 1, 1, 70, 32)), jnp.float32) for _ in range(3))
    numbers = [jnp.full((1,), n, jnp.float32) for n in (0.5, 1e-7, 1e-7)]
    score, n, mask = YatScore(*numbers), Normalization().by_head(1, 1), Mask(window=2)

    def right(q, k, v):
        return plain(q, k[:, :, 0], v[:, :, 0], score, mask, n)

    @jax.jit
    def both(x, v, dy):
        y, pull = jax.vjp(right, x, x, v)
        k, values = x[:, :, 0], v[:, :, 0]
        ours, level = gpu.forward(x, k, values, score, mask, n, interpret=True)
        gradients = gpu.backward(x, k, values, score, mask, n, level, centre(dy, ours), dy, interpret=True)
        return (y, *pull(dy)), (ours, *gradients[:3])

    for one, other in zip(*both(x, v, dy), strict=True):
        assert np.linalg.norm(one) > 1.0
        np.testing.assert_allclose(np.reshape(other, one.shape), one, rtol=1e-3, atol=1e-4)


def test_weights_of_large_scores_sum_to_1(rng):
    """Scores of 1e4, log₂ e times which float32 rounds by up to 2⁻¹¹: the level once, and a score once, 7e-4 in all.

    Vectors are integers, whose products are exact in any order. Query i gets dL/dy = 1 in entry i alone, so that dv is
    the weights of the backward pass, (key, query).
    """
    q, k = (rng.integers(-1, 2, (1, 4, *shape)) for shape in ((1, 32, 32), (48, 32)))
    q[..., 0], k[..., 0] = rng.integers(195, 205, (1, 4, 1, 32)), 300
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, rng.normal(size=k.shape)))
    score = YatScore(*(jnp.full((1,), n, jnp.float32) for n in (0.0, 0.15, 0.25)))
    dy = jnp.broadcast_to(jnp.eye(32), q.shape)
    y, level, (_, _, weights, _) = run(q, k, v, dy, score, Mask(), "softmax")
    assert 8e3 < np.min(level) and np.max(level) < 2**14 and np.mean(np.max(weights, 2)) < 0.9
    np.testing.assert_allclose(np.sum(weights, 2), 1.0, atol=7e-4)
    np.testing.assert_allclose(np.swapaxes(weights, 2, 3) @ v, y[:, :, 0], atol=7e-4 * np.max(np.abs(v)))


@pytest.mark.parametrize("window", [None, 1, 5, 12])
def test_blocks_that_are_seen_are_those_that_are_visited(window):
    """First … last are the blocks with any pair that is seen, a … b those without one that is not, both ways."""
    for t, s, rows, columns, offset in [(20, 20, 4, 8, 0), (13, 29, 8, 4, 16), (9, 30, 4, 4, 3), (20, 7, 4, 4, -9)]:
        form = gpu_tile.Form(True, True, 0.0, True, True, window, t, s, rows, columns, True)
        high, wide = -(-t // rows) * rows, -(-s // columns) * columns
        position, key = np.arange(high)[:, None] + offset, np.arange(wide)
        seen = (key <= position) & (key > position - (window or 1000))
        tiles = seen.reshape(high // rows, rows, wide // columns, columns)
        real = (np.arange(high)[:, None] < t) & (key < s)
        whole = (seen & real).reshape(tiles.shape).all((1, 3))
        for of, some, all_ in (
            (gpu_kernels.span_of_queries, tiles.any((1, 3)), (seen & (key < s)).reshape(tiles.shape).all((1, 3))),
            (
                gpu_kernels.span_of_keys,
                tiles.any((1, 3)).T,
                (seen & real | (seen & (key >= s))).reshape(tiles.shape).all((1, 3)).T,
            ),
        ):
            for i in range(len(some)):
                first, a, b, last = (int(x) for x in of(form, jnp.int32(i), offset))
                assert first <= a <= b <= last
                assert list(range(first, last)) == list(np.flatnonzero(some[i])), (of, i)
                assert list(range(a, b)) == list(np.flatnonzero(all_[i])), (of, i)
        assert whole.any() or window in (1, 5)


def shapes(width, dtype, r=2, t=300):
    q, k = (jax.ShapeDtypeStruct(size, dtype) for size in ((2, 2, r, t, width), (2, 2, t, width)))
    segments = jax.ShapeDtypeStruct((2, t), jnp.int32)
    valid = jax.ShapeDtypeStruct((2, t), bool)
    return q, k, segments, valid


def both(q, k, v, score, segments, valid, offset, normalization):
    n = Normalization(normalization).by_head(*q.shape[1:3])
    mask = Mask(window=100, offset=offset, query_segments=segments, key_segments=segments, valid=valid)
    y, level = gpu.forward(q, k, v, score, mask, n)
    return y, gpu.backward(q, k, v, score, mask, n, level, centre(y, y), y)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize(
    ("width", "dtype"),
    [
        (64, "bfloat16"),
        (128, "float32"),
        *(
            pytest.param(*more, marks=pytest.mark.slow)
            for more in [(32, "bfloat16"), (32, "float32"), (64, "float32"), (128, "bfloat16")]
        ),
    ],
)
def test_lowers_for_cuda(width, dtype):
    q, k, segments, valid = shapes(width, dtype)
    number = jax.ShapeDtypeStruct((4,), jnp.float32)
    mesh = AbstractMesh((1,), ("data",), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu"))
    for score, normalization in [(YatScore(number, number, number), "l1"), (DotScore(), "softmax")]:
        f = jax.jit(partial(both, normalization=normalization))
        with jax.sharding.use_abstract_mesh(mesh):
            traced = f.trace(q, k, k, score, segments, valid, jax.ShapeDtypeStruct((), jnp.int32))
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("__gpu$xla.gpu.triton") == 3
        assert all(f'name = "{name}"' in text for name in ("forward", "of_queries", "of_keys"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_products_take_the_operands_dtype_and_keep_float32(dtype):
    q, k, segments, valid = shapes(64, dtype)
    jaxpr = jax.make_jaxpr(partial(both, normalization="softmax"))(q, k, k, YatScore(), segments, valid, 0).jaxpr
    products = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    assert len(products) >= 2 + 3 + 4
    for e in products:
        assert {v.aval.dtype for v in e.invars} == {jnp.dtype(dtype)} and e.outvars[0].aval.dtype == "float32"
        assert dtype == "bfloat16" or e.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2


def test_what_is_unsupported_is_said():
    q, k, _, _ = shapes(64, "bfloat16")
    odd, half = shapes(48, "bfloat16"), shapes(64, "float16")
    assert gpu.unsupported(q, k, k) == ""
    assert gpu.unsupported(odd[0], odd[1], odd[1]) == "heads of width 48"
    assert gpu.unsupported(q, k, shapes(32, "bfloat16")[1]) == "values of another width, 32"
    assert gpu.unsupported(half[0], half[1], half[1]) == "float16"


@pytest.mark.parametrize(
    ("taken", "kinds"),
    [
        (False, ["AMD Instinct MI300X", "Tesla V100-SXM2-16GB", "NVIDIA V100", "Tesla P100-PCIE-16GB", "NVIDIA P4"]),
        (False, ["Tesla T4", "NVIDIA T4", "NVIDIA T1000", "NVIDIA GeForce RTX 2080 Ti", "NVIDIA GeForce GTX 1080"]),
        (False, ["NVIDIA Quadro RTX 6000", "NVIDIA TITAN V", "NVIDIA TITAN RTX"]),
        (True, ["NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA A10", "NVIDIA L4", "NVIDIA L40S", "NVIDIA RTX A4000"]),
        (True, ["NVIDIA GeForce RTX 2050", "NVIDIA RTX 2000 Ada Generation", "NVIDIA GeForce RTX 3090"]),
        (True, ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB", "NVIDIA B200", "NVIDIA GB200"]),
    ],
)
def test_gpus_older_than_ampere_are_refused(taken, kinds):
    """Triton does not compile bfloat16 for them."""
    q, k, _, _ = shapes(64, "bfloat16")
    for kind in kinds:
        mesh = AbstractMesh((1,), ("data",), abstract_device=AbstractDevice(kind, 1, "cuda"))
        with jax.sharding.use_abstract_mesh(mesh):
            assert gpu.unsupported(q, k, k) == ("" if taken else f"{kind}, only NVIDIA GPUs from Ampere on")
