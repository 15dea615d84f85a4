"""To nmn: every ⵟ layer of a network as one of that package's, in nnx and torch, and run by code not written here.

What is compared is layers and not logits, each on what it is given in Aether's forward pass of all inputs (of texts the
first ids: float64 numbers take much room), and nmn in float64. A layer has two numbers: how far nmn is from the formula
in float64, as `numpy_model` has it, and from Aether's own layer, which is float32.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from aether.config import build
from aether.errors import CheckError, InputError
from aether.explain.layers import Seen, seen
from aether.export.bundle import portable, state_of
from aether.export.parity import LayerParity, Pairs
from aether.export.reference import numpy_model
from aether.export.source import Source, Target
from aether.models import describe_model
from aether.nn import YatAttention, YatConv2D, YatLinearAttention, YatNMN
from aether.nn.nmn import to_nmn

FRAMEWORKS = ("nnx", "torch")
LAYERS = "layers.json"
_POSITIONS = 8  # of each text
_LAYERS = Path(__file__).parent / "reference" / "nmn_layers.py"


def write(source: Source, folder: Path) -> None:
    """Write layers.json, the states that go with it, and how to load them.

    Raises:
      InputError: the network has no layer that nmn could have.
    """
    f = source.facts
    x = np.zeros((1, f["image_size"], f["image_size"], f["channels"]), np.float32) if "classes" in f else None
    layers: dict[str, dict[str, Any]] = {}
    left_out: dict[str, dict[str, str]] = {}
    states: dict[str, dict[str, np.ndarray]] = {framework: {} for framework in FRAMEWORKS}
    for name, one in seen_layers(source, np.zeros((1, 1), np.int32) if x is None else x).items():
        for framework in FRAMEWORKS:
            if reason := missing(one.layer, framework):
                left_out.setdefault(name, {})[framework] = reason
                continue
            parts = heads_of(one.layer) if isinstance(one.layer, YatAttention) else [one.layer]
            made = constructor(parts[0], framework) | dict(parts=len(parts))
            made |= dict(causal=f.get("causal", False)) if isinstance(one.layer, YatAttention) else {}
            layers.setdefault(name, {})[framework] = made
            for k, part in enumerate(parts):
                states[framework] |= {f"{name}/{k}/{key}": a for key, a in to_nmn(part, framework).items()}
    if not layers:
        why = "; ".join(f"{name}: {next(iter(reasons.values()))}" for name, reasons in left_out.items())
        raise InputError(f"The network has no ⵟ layer that nmn has ({why or 'none at all'}); take another --to.")
    content = dict(layers=layers, left_out=left_out)
    (folder / LAYERS).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for framework, arrays in states.items():
        np.savez(folder / f"{framework}.npz", **arrays)  # type: ignore[arg-type]
    shutil.copy(_LAYERS, folder / _LAYERS.name)


def missing(layer: Any, framework: str) -> str:
    """Return why nmn does not have a layer, or "" if it does."""
    if isinstance(layer, YatLinearAttention):
        return "nmn has no linear attention by anchors"
    if isinstance(layer, YatConv2D) and layer.spherical:
        return "nmn's convolutions do not compare directions"
    if isinstance(layer, YatAttention):
        if layer.bias is not None:
            return "nmn's attention has no b in its scores"
        if layer.rope_theta is not None:
            return "nmn's rotary attention has one α and one ε for all heads"
        if framework == "torch":
            return "nmn.torch's attention has one α and one ε for all heads, and no layers as narrow as one"
    return ""


def constructor(layer: Any, framework: str) -> dict[str, Any]:
    """Return the class of nmn and the arguments that make a layer like this one."""
    torch = framework == "torch"
    if isinstance(layer, YatAttention):
        width, inner = layer.query.kernel.shape
        sizes = dict(num_heads=layer.num_heads, in_features=width, qkv_features=inner, out_features=width)
        how = dict(use_bias=layer.query.bias is not None, normalize_qk=layer.spherical, deterministic=True)
        return {"class": "MultiHeadAttention", "options": sizes | how | dict(learnable_epsilon=True)}
    unit = {
        "bias" if torch else "use_bias": layer.bias is not None,
        "softplus_bias": layer.softplus_bias,
        "learnable_epsilon": layer.epsilon_param is not None,
    }
    *window, inputs, outputs = layer.kernel_shape
    if isinstance(layer, YatNMN):
        sizes = dict(in_features=inputs, out_features=outputs)
        return {"class": "YatNMN", "options": sizes | unit | dict(spherical=layer.spherical)}
    geometry: dict[str, Any] = dict(in_features=inputs, out_features=outputs, kernel_size=window)
    geometry |= dict(strides=list(layer.strides), padding=[[n // 2, n // 2] for n in window])
    if torch:
        geometry = dict(in_channels=inputs, out_channels=outputs, kernel_size=window)
        geometry |= dict(stride=list(layer.strides), padding=[n // 2 for n in window])
    return {"class": "YatConv2D", "options": geometry | unit}


def heads_of(layer: Any) -> list[Any]:
    """Return one layer of one head for each of a layer's, which it is the sum of; the first has the output's bias."""
    width, heads, k = layer.in_features, layer.num_heads, layer.head_features
    biased = layer.query.bias is not None
    options: dict[str, Any] = dict(qkv_features=k, use_bias=biased, spherical=layer.spherical, learnable_epsilon=True)
    found = []
    for i in range(heads):
        one: Any = YatAttention(width, 1, use_score_bias=False, rngs=nnx.Rngs(0), **options)
        own = slice(i * k, (i + 1) * k)
        for mine, theirs in zip((one.query, one.key, one.value), (layer.query, layer.key, layer.value), strict=True):
            mine.kernel[...] = theirs.kernel[...][:, own]
            if biased:
                mine.bias[...] = theirs.bias[...][own]
        one.out.kernel[...] = layer.out.kernel[...][own]
        if biased:
            one.out.bias[...] = layer.out.bias[...] * (i == 0)
        one.alpha[...], one.epsilon_param[...] = layer.alpha[...][i : i + 1], layer.epsilon_param[...][i : i + 1]
        found.append(one)
    return found


def seen_layers(source: Source, x: np.ndarray) -> dict[str, Seen]:
    """Return the ⵟ layers of a network by name, with what each is given when the network is given x."""
    config = portable(build(source.record["config"]))
    graph, *shapes = describe_model(config)
    return seen(nnx.merge(graph, state_of(config, nnx.merge_state(*shapes), source.parameters)), x)


def ours(source: Source, batches: list[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield what each layer is given, and what it makes of it twice: in Aether, and by the formula in float64."""
    f = source.facts
    p = {name: np.asarray(a, np.float64) for name, a in source.parameters.items()}
    inputs = np.concatenate([b[:, :_POSITIONS] if b.ndim == 2 else b for b in batches])
    for name, (layer, x, y) in seen_layers(source, inputs).items():
        frameworks = [framework for framework in FRAMEWORKS if not missing(layer, framework)]
        if not frameworks:
            continue
        wide = x.astype(np.float64)
        if isinstance(layer, YatAttention):
            exact = numpy_model.attention(p, f, name, wide)
        elif isinstance(layer, YatConv2D):
            exact = numpy_model.yat_conv(p, f, name, wide, layer.strides[0])
        else:
            exact = numpy_model.yat(p, f, name, wide)
        for _ in frameworks:
            yield wide, np.stack([exact, y.astype(np.float64)])


def replay(folder: Path, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield what nmn's layers make of their inputs, in the order of layers.json."""
    from aether.export.reference import nmn_layers

    loaded = {framework: nmn_layers.load(str(folder), framework) for framework in FRAMEWORKS}
    return (loaded[framework][name](x) for (name, framework), x in zip(_cases(folder), batches, strict=True))


def compare(folder: Path, pairs: Pairs) -> LayerParity:
    """Compare layer by layer."""
    found: dict[str, dict[str, Any]] = {}
    inputs = 0
    for (name, framework), (ours, theirs) in zip(_cases(folder), pairs, strict=True):
        inputs = len(theirs)
        formula, aether = (_relative(a, theirs) for a in ours)
        found.setdefault(name, {})[framework] = dict(formula=formula, aether=aether)
    return LayerParity(inputs, found, json.loads((folder / LAYERS).read_text(encoding="utf-8"))["left_out"])


def _relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    if ours.shape != theirs.shape:
        raise CheckError(f"Aether's layer gives {ours.shape}, and nmn's {theirs.shape}.")
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def _cases(folder: Path) -> list[tuple[str, str]]:
    layers = json.loads((folder / LAYERS).read_text(encoding="utf-8"))["layers"]
    return [(name, framework) for name, made in layers.items() for framework in FRAMEWORKS if framework in made]


TARGET = Target(
    "layers of nmn (AGPL-3.0)",
    write,
    replay,
    use='from nmn_layers import load\n\nlayers = load(".", "nnx")  # or "torch"\ny = layers[name](x)  # of layers.json',
    packages=("nmn", "torch"),
    extra="parity",
    environment={"JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"},
    ours=ours,
    compare=compare,
)
