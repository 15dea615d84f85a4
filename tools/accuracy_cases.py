"""The cases of `tools.accuracy`: every layer with its options crossed, beside its formula in float64."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from tools import reference

BOUNDS = {"float32": 2e-6, "bfloat16": 1e-2}
Values = dict[str, np.ndarray]

BIAS: dict[str, dict[str, Any]] = {
    "no b": dict(use_bias=False),
    "plain b": dict(bias_init=0.1),
    "softplus b": dict(softplus_bias=True, bias_init=0.1),
    "scalar b": dict(scalar_bias=True, bias_init=0.1),
    "constant b": dict(constant_bias=0.3),
}
ALPHA: dict[str, dict[str, Any]] = {
    "α": dict(alpha_init=1.7),
    "α=√2": dict(constant_alpha=True),
    "no α": dict(use_alpha=False),
}
EPSILON: dict[str, dict[str, Any]] = {"ε": dict(epsilon=0.05), "learned ε": dict(epsilon=0.05, learnable_epsilon=True)}
GEOMETRY: dict[str, dict[str, Any]] = {
    "plain": {},
    "spherical": dict(spherical=True),
    "weight-normalized": dict(weight_normalized=True),
}
DISTANCE: dict[str, dict[str, Any]] = {"expanded": {}, "exact": dict(distance="exact")}


class Case(NamedTuple):
    """A layer with its options, the arrays it is differentiated by, and both of its forms.

    `run` maps `values` in float32 or bfloat16 to an output, by JAX; `right` maps them in float64 or complex, by NumPy;
    `kappa` maps them to κ.
    """

    name: str
    dtype: str
    values: Values
    run: Callable[[dict[str, Any]], Any]
    right: Callable[[Values], np.ndarray]
    kappa: Callable[[Values], float]


def cases() -> Iterator[Case]:
    """Yield all cases."""
    yield from dense_cases()
    yield from embed_cases()
    yield from conv_cases()
    yield from attention_cases()


def softplus(x: np.ndarray) -> np.ndarray:
    """log(1 + eˣ), of complex arrays too."""
    return np.log1p(np.exp(x))


def unit_of(values: Values, options: dict[str, Any]) -> dict[str, Any]:
    """Return b, α and ε of the formula from the parameters of a layer made with `options`."""
    bias = values.get("bias", np.array(options.get("constant_bias") or 0.0))
    alpha = np.sqrt(2.0) if options.get("constant_alpha") else 1.0
    epsilon = values.get("epsilon_param")
    return dict(
        bias=softplus(bias) if options.get("softplus_bias") else bias,
        alpha=values.get("alpha", alpha),
        epsilon=options["epsilon"] if epsilon is None else softplus(epsilon),
    )


def parameters(layer: Any, rng: np.random.Generator, dtype: str) -> Values:
    """Return the parameters of `layer`, moved from their starting values, the kernel rounded to `dtype`."""
    import jax.numpy as jnp
    from flax import nnx

    values = {path[-1]: np.asarray(v[...], np.float64) for path, v in nnx.to_flat_state(nnx.state(layer))}
    moved = {k: v + 0.2 * rng.normal(size=v.shape) for k, v in values.items()}
    rounded = {k: v if k not in ("kernel", "embedding") else jnp.asarray(v, dtype) for k, v in moved.items()}
    return {k: np.asarray(v, np.float64) for k, v in rounded.items()}


def runner(layer: Any, call: Callable[[Any, Any], Any] = lambda layer, x: layer(x)) -> Callable[[dict[str, Any]], Any]:
    """Return the function of (x and the parameters of `layer`) that `Case.run` is."""
    from flax import nnx

    graph, state = nnx.split(layer)

    def run(values: dict[str, Any]) -> Any:
        flat = [(path, v.replace(values[path[-1]].astype("float32"))) for path, v in nnx.to_flat_state(state)]
        return call(nnx.merge(graph, nnx.from_flat_state(flat)), values["x"])

    return run


def layer_case(
    name: str,
    layer: Any,
    x: np.ndarray,
    values: Values,
    options: dict[str, Any],
    formula: Callable[..., np.ndarray],
    condition: Callable[..., np.ndarray] = reference.condition,
    call: Callable[[Any, Any], Any] = lambda layer, x: layer(x),
) -> Case:
    """Return the case of a layer with prototypes; `formula` and `condition` take x, them, b, α, ε and the geometry."""
    kernel = "embedding" if "embedding" in values else "kernel"
    geometry = {k: True for k in ("spherical", "weight_normalized") if options.get(k)}

    def right(v: Values) -> np.ndarray:
        return formula(v["x"], v[kernel], **unit_of(v, options), **geometry)

    def kappa(v: Values) -> float:
        return max(1.0, float(condition(v["x"], v[kernel], **unit_of(v, options), **geometry).max()))

    return Case(name, layer.dtype, {"x": x, **values}, runner(layer, call), right, kappa)


def dense_cases() -> Iterator[Case]:
    """Yield `YatNMN` with every b, α, ε, geometry and distance, in both dtypes; inputs lie near some prototypes."""
    from flax import nnx

    from aether.nn import YatNMN

    rng = np.random.default_rng(0)
    for keys in itertools.product(BIAS, ALPHA, EPSILON, GEOMETRY, DISTANCE, BOUNDS):
        bias, alpha, epsilon, geometry, distance, dtype = keys
        options = BIAS[bias] | ALPHA[alpha] | EPSILON[epsilon] | GEOMETRY[geometry]
        layer = YatNMN(12, 5, **options, **DISTANCE[distance], dtype=dtype, rngs=nnx.Rngs(0))
        values = parameters(layer, rng, dtype)
        x = rng.normal(size=(6, 12)) / np.sqrt(12)
        x[:2] = values["kernel"].T[:2] + 0.05 * rng.normal(size=(2, 12))
        name = f"YatNMN: {', '.join(keys[:-1])}"
        yield layer_case(name, layer, x, values, options, reference.yat)


def embed_cases() -> Iterator[Case]:
    """Yield `YatEmbed.attend` with every α, ε, geometry and distance."""
    from flax import nnx

    from aether.nn import YatEmbed

    rng = np.random.default_rng(1)
    for keys in itertools.product(ALPHA, EPSILON, GEOMETRY, DISTANCE, BOUNDS):
        alpha, epsilon, geometry, distance, dtype = keys
        options = ALPHA[alpha] | EPSILON[epsilon] | GEOMETRY[geometry]
        layer = YatEmbed(5, 12, **options, **DISTANCE[distance], dtype=dtype, rngs=nnx.Rngs(0))
        values = parameters(layer, rng, dtype)
        q = rng.normal(size=(6, 12)) / np.sqrt(12)
        name = f"YatEmbed.attend: {', '.join(keys[:-1])}"
        condition, call = (lambda q, e, **unit: reference.condition(q, e.T, **unit)), (lambda m, q: m.attend(q))
        yield layer_case(name, layer, q, values, options, reference.attend, condition, call)


CONV: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "1D": ((7,), {}),
    "1D causal": ((7,), dict(padding="CAUSAL", kernel_dilation=2)),
    "1D reflect": ((7,), dict(padding="REFLECT")),
    "1D input dilation": ((4,), dict(padding=[(1, 2)], input_dilation=2)),
    "2D valid, strides": ((5, 4), dict(padding="VALID", strides=(2, 1))),
    "2D circular": ((4, 3), dict(padding="CIRCULAR")),
    "2D groups": ((4, 3), dict(feature_group_count=2)),
    "2D explicit, dilation": ((5, 4), dict(padding=[(1, 0), (2, 1)], kernel_dilation=(2, 1))),
    "3D": ((3, 2, 3), dict(strides=2)),
}
TRANSPOSED: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "1D": ((4,), dict(strides=2)),
    "1D circular": ((4,), dict(strides=2, padding="CIRCULAR")),
    "2D valid": ((3, 2), dict(strides=(2, 1), padding="VALID")),
    "2D dilation": ((3, 3), dict(kernel_dilation=2)),
    "2D transposed kernel": ((3, 2), dict(strides=2, transpose_kernel=True)),
    "3D": ((2, 2, 2), dict(strides=2)),
}
# Enough to see each option with each form; all of them are crossed in the dense layer, which shares the code.
UNITS: dict[str, dict[str, Any]] = {
    "plain b, α, ε": BIAS["plain b"] | ALPHA["α"] | EPSILON["ε"],
    "softplus b, α=√2, learned ε": BIAS["softplus b"] | ALPHA["α=√2"] | EPSILON["learned ε"],
    "scalar b, no α, learned ε": BIAS["scalar b"] | ALPHA["no α"] | EPSILON["learned ε"],
}


def conv_cases() -> Iterator[Case]:
    """Yield `YatConv` and `YatConvTranspose` with every padding, stride, dilation and rank, and every geometry."""
    from flax import nnx

    from aether.nn import YatConv, YatConvTranspose

    rng = np.random.default_rng(2)
    kinds = [(YatConv, reference.yat_conv, k, *v) for k, v in CONV.items()]
    kinds += [(YatConvTranspose, reference.yat_conv_transpose, k, *v) for k, v in TRANSPOSED.items()]
    geometries = itertools.cycle(itertools.product(UNITS, GEOMETRY, DISTANCE))
    for (kind, formula, shape_name, size, window), dtype in itertools.product(kinds, BOUNDS):
        for _ in range(3):
            unit, geometry, distance = next(geometries)
            options = UNITS[unit] | GEOMETRY[geometry]
            if "transpose_kernel" in window:  # its prototypes lie along another axis than those that are normalised
                options = options | dict(weight_normalized=False)
            taps = (3, 2, 2)[: len(size)]
            layer = kind(2, 4, taps, **window, **options, **DISTANCE[distance], dtype=dtype, rngs=nnx.Rngs(0))
            values = parameters(layer, rng, dtype)
            name = f"{kind.__name__}: {shape_name}, {unit}, {geometry}, {distance}"
            x = rng.normal(size=(2, *size, 2))
            of_patches = partial(formula, of=reference.condition, **window)
            yield layer_case(name, layer, x, values, options, partial(formula, **window), of_patches)


def attention_cases() -> Iterator[Case]:
    """Yield attention with every normalisation, mask and form of the scores, plain and by blocks."""
    from aether.kernels.attention import YatScore, attention
    from aether.kernels.masks import Mask
    from aether.kernels.normalization import NORMALIZATIONS, Normalization
    from aether.kernels.yat import unit

    rng = np.random.default_rng(3)
    b, t, h, g, d = 2, 7, 4, 2, 6
    ahead = np.arange(t) - np.arange(t)[:, None]
    segments = np.repeat([[0, 1, 2]], [2, 3, 2], axis=1).repeat(b, 0)
    masks: dict[str, tuple[Mask, Any]] = {
        "all": (Mask(), True),
        "causal": (Mask(causal=True), ahead <= 0),
        "window": (Mask(window=3), (ahead <= 0) & (ahead > -3)),
        "segments": (
            Mask(query_segments=segments, key_segments=segments),
            segments[:, None, :, None] == segments[:, None, None],
        ),
    }
    # Of the order of the sums: with a small constant the outputs do not depend on α, whose gradient is all rounding.
    kinds = {name: Normalization(name, 2.0 if name == "softermax" else 1.0, 0.5) for name in NORMALIZATIONS}
    for keys in itertools.product(kinds, masks, ("plain", "spherical"), ("plain", "blockwise"), BOUNDS):
        kind, name, geometry, impl, dtype = keys
        values = dict(
            q=rng.normal(size=(b, t, h, d)) / np.sqrt(d),
            k=rng.normal(size=(b, t, g, d)) / np.sqrt(d),
            v=rng.normal(size=(b, t, g, d)),
            bias=rng.uniform(0.1, 0.5, h),
            alpha=rng.uniform(1.0, 2.0, h),
            epsilon=rng.uniform(0.3, 0.5, h),
        )
        (mask, seen), normalization, spherical = masks[name], kinds[kind], geometry == "spherical"

        def run(
            v: dict[str, Any], mask: Any = mask, to: Any = normalization, spherical: Any = spherical, impl: Any = impl
        ) -> Any:
            score = YatScore(v["bias"], v["alpha"], v["epsilon"], spherical=spherical, nonnegative_bias=True)
            q, k = (unit(v[n]) if spherical else v[n] for n in ("q", "k"))
            return attention(q, k, v["v"], score, mask=mask, normalization=to, impl=impl, block=3)

        def right(v: Values, seen: Any = seen, to: Any = normalization, spherical: Any = spherical) -> np.ndarray:
            to_what = dict(normalization=to.name, power=to.power, l1_epsilon=to.constant)
            unit = dict(bias=v["bias"], alpha=v["alpha"], epsilon=v["epsilon"], spherical=spherical)
            return reference.yat_attention(v["q"], v["k"], v["v"], mask=seen, **to_what, **unit)

        def kappa(v: Values, spherical: Any = spherical) -> float:
            q, k = v["q"].swapaxes(1, 2), v["k"].repeat(h // g, 2).swapaxes(1, 2)
            heads = ((q[i, j], k[i, j].T, v["epsilon"][j]) for i, j in np.ndindex(b, h))
            return max(reference.kappa(*head, spherical=spherical) for head in heads)

        yield Case(f"attention: {', '.join(keys[:-1])}", dtype, values, run, right, kappa)
