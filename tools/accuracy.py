"""How far every ⵟ layer is from its formula in float64, on the same rounded inputs.

python -m tools.accuracy --what=layers     every option crossed: error of the output and of each gradient over its bound
python -m tools.accuracy --what=distance   ‖x − w‖² for inputs near their prototypes, expanded and exact

The bound of an array's ‖err‖₂/‖ref‖₂ is 2e-6·κ in float32 and 1e-2·κ in bfloat16, κ = max(1, max S/(D + ε)) over the
pairs of an input and a prototype, D = ‖x − w‖² and S = ‖x‖² + ‖w‖². A gradient that is one number may be off by the
same factor times the sum of the absolute values of its terms.
"""

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from launch import cli
from tools import reference

FLAGS = cli.new_flags()
flags.DEFINE_enum("what", "layers", ["layers", "distance"], "which table", flag_values=FLAGS)
flags.DEFINE_bool("json", False, "one JSON line a case instead of the table", flag_values=FLAGS)

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


class Error(NamedTuple):
    """The error of one array over its bound (1 is the bound itself), and the relative error as it is."""

    of: str
    share: float
    relative: float


def main(args: flags.FlagValues) -> None:
    """Print one of the tables."""
    if args.what == "distance":
        return _print_distances(args.json)
    worst: dict[tuple[str, str], tuple[int, Error, str]] = {}
    for i, case in enumerate(cases()):
        _, errors = measure(case)
        if args.json:
            rows = {e.of: dict(share=e.share, relative=e.relative) for e in errors}
            print(json.dumps(dict(case=case.name, dtype=case.dtype, errors=rows)), flush=True)
        top = max(errors, key=lambda e: e.share)
        group = case.name.split(":")[0], case.dtype
        count, before, name = worst.get(group, (0, Error("", -1.0, 0.0), ""))
        worst[group] = (count + 1, *((top, case.name) if top.share > before.share else (before, name)))
        if i % 20 == 0:
            print(f"{i} cases", file=sys.stderr, flush=True)
    if not args.json:
        _print_layers(worst)


def _print_layers(worst: dict[tuple[str, str], tuple[int, Error, str]]) -> None:
    print(f"{sum(count for count, *_ in worst.values())} cases; error/bound of the worst array of each layer")
    for (layer, dtype), (count, error, name) in worst.items():
        print(f"{layer:18} {dtype:9} {count:4} cases  {error.share:8.4f}  {error.of:14} {error.relative:.1e}  {name}")


def measure(case: Case) -> tuple[float, list[Error]]:
    """Run `case` forward and backward; return κ, and the errors of the output and of each gradient."""
    import jax
    import jax.numpy as jnp

    half = {"x", "kernel", "embedding", "q", "k", "v"}  # what is rounded to the compute dtype
    given = {k: jnp.asarray(v, case.dtype if k in half else "float32") for k, v in case.values.items()}
    exact = {k: np.asarray(v, np.float64) for k, v in given.items()}
    want = case.right(exact)
    cotangent = np.asarray(jnp.asarray(np.random.default_rng(1).normal(size=want.shape), case.dtype), np.float64)

    @jax.jit
    def both(values: dict[str, Any], g: Any) -> tuple[Any, Any]:
        y, back = jax.vjp(case.run, values)
        return y, back(g.astype(y.dtype))[0]

    y, grads = both(given, jnp.asarray(cotangent, "float32"))
    kappa = case.kappa(exact)
    bound = BOUNDS[case.dtype] * kappa
    errors = [_error("y", np.asarray(y, np.float64), want, None, bound)]
    names = list(exact)
    right = reference.gradient(lambda *v: case.right(dict(zip(names, v, strict=True))), list(exact.values()), cotangent)
    for name, (grad, size) in zip(names, right, strict=True):
        errors.append(_error(name, np.asarray(grads[name], np.float64), grad, size if size.size == 1 else None, bound))
    return kappa, errors


def _error(of: str, got: np.ndarray, want: np.ndarray, size: np.ndarray | None, bound: float) -> Error:
    if got.shape != want.shape:
        raise ValueError(f"{of} has shape {got.shape}, the reference {want.shape}.")
    scale = np.linalg.norm(want) if size is None else np.sum(size)
    relative = float(np.linalg.norm(got - want) / max(scale, 1e-300)) if np.any(got != want) else 0.0
    return Error(of, relative / bound, relative)


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


class Near(NamedTuple):
    """Inputs x = w + noise: the relative errors of ‖x − w‖², and of y as shares of the bound (κ for ε = 1e-5)."""

    norm: float
    noise: float
    distance: float
    exact: float
    expanded: float
    exact_share: float
    expanded_share: float


def near_cases(d: int = 768, rows: int = 64) -> Iterator[Near]:
    """Yield one `Near` for each ‖w‖ from 1e-2 to 1e3 and each noise from 0 to 1e-1, the worst of `rows` pairs."""
    import jax
    import jax.numpy as jnp

    from aether.kernels.yat import DISTANCES, squared_distances, yat

    rng = np.random.default_rng(0)
    diagonal = jax.jit(lambda f, x, w: jnp.diag(f(x, w)), static_argnums=0)
    forms = [partial(yat, distance=form, transposed=True) for form in DISTANCES]
    for norm, noise in itertools.product(10.0 ** np.arange(-2, 4), (0.0, *10.0 ** np.arange(-6, 0))):
        w = rng.normal(size=(rows, d))
        w *= norm / np.linalg.norm(w, axis=-1, keepdims=True)
        x, w = (np.asarray(v, np.float32) for v in (w + noise * rng.normal(size=(rows, d)), w))
        a, b = (v.astype(np.float64) for v in (x, w))
        right, size = ((a - b) ** 2).sum(-1), (a**2).sum(-1) + (b**2).sum(-1)
        exact, *ys = (np.asarray(diagonal(f, x, w), np.float64) for f in (squared_distances, *forms))
        expanded = (x * x).sum(-1) + (w * w).sum(-1) - 2 * (x * w).sum(-1)
        off = [(np.abs(v - right) / np.where(right > 0, right, 1.0)).max() for v in (exact, expanded)]
        want = (a * b).sum(-1) ** 2 / (right + 1e-5)
        bound = BOUNDS["float32"] * max(1.0, (size / (right + 1e-5)).max()) * np.linalg.norm(want)
        shares = [np.linalg.norm(y - want) / bound for y in ys]
        yield Near(norm, noise, float(right.mean()), *map(float, off), float(shares[1]), float(shares[0]))


def _print_distances(as_json: bool) -> None:
    if not as_json:
        print("relative error of ‖x − w‖² at x = w + noise, d = 768 (absolute at 0), and the error of y over its bound")
        print(
            f"{'‖w‖':>8} {'noise':>8} {'‖x − w‖²':>10} {'exact':>9} {'expanded':>9} {'y exact':>9} {'y expanded':>10}"
        )
    for r in near_cases():
        if as_json:
            print(json.dumps(r._asdict()), flush=True)
        else:
            print(
                f"{r.norm:8.0e} {r.noise:8.0e} {r.distance:10.3g} {r.exact:9.1e} {r.expanded:9.1e}"
                f" {r.exact_share:9.4f} {r.expanded_share:10.4f}"
            )


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
