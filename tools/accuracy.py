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
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from launch import cli
from tools import reference
from tools.accuracy_cases import BOUNDS, Case, cases

FLAGS = cli.new_flags()
flags.DEFINE_enum("what", "layers", ["layers", "distance"], "which table", flag_values=FLAGS)
flags.DEFINE_bool("json", False, "one JSON line a case instead of the table", flag_values=FLAGS)


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
