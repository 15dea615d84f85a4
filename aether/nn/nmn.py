"""Parameters of `nmn`'s layers into ours and back: its names and layouts in nnx, torch and linen, in one place.

Ours are called as in nmn.nnx and lie as there, except where the table says otherwise:

| ours | nmn.nnx | nmn.torch | nmn.linen |
|---|---|---|---|
| `YatNMN.kernel` (in, out) | the same | `weight` (out, in) | `kernel` (out, in) |
| `YatConv.kernel` (k..., in/groups, out) | the same | `weight` (out, in/groups, k...) | the same |
| `YatConvTranspose.kernel` (k..., in, out) | the same | `weight` (in, out, k...), k... reversed | the same |
| `YatEmbed.embedding` (vocab, features) | the same | the same | the same |
| `YatAttention.query.kernel` (in, heads·k), ... | the same | `q_proj.weight` (heads·k, in), ... | the same |
| `YatAttention.out.kernel` (heads·k, out) | (heads, k, out) | `out_proj.weight` (out, heads·k) | the same |
| both with rotation | `q_proj.kernel` (in, heads·k), ... `o_proj.kernel` (heads·k, out) | none | none |
| `kernel_bank.kernel` | `kernel` (..., size of the bank) | `weight`, as above | none |

`bias`, `alpha` and `epsilon_param` are the same everywhere; `alpha` and `epsilon_param` of an attention layer are (1,)
in nmn and one a head in ours. Recurrent cells are not in nmn. Neither nmn nor torch is imported here.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from aether.nn.attention import YatAttention
from aether.nn.conv import YatConv, YatConvTranspose
from aether.nn.embed import YatEmbed
from aether.nn.param import FrozenParam
from aether.nn.yat import YatNMN, YatUnit

Arrays = dict[str, np.ndarray[Any, Any]]
Move = Callable[[Any], Any]

FRAMEWORKS = ("nnx", "torch", "linen")
_LAYERS = (YatNMN, YatConv, YatConvTranspose, YatEmbed, YatAttention)
_TORCH_PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
_ROTARY_PROJECTIONS = _TORCH_PROJECTIONS | {"out": "o_proj"}
_CONSTANT_ALPHA = "_constant_alpha_value"
_NO_PARAMETERS = ("dropconnect_", "freqs_", "cached_", "cache_index", _CONSTANT_ALPHA)  # in the state of nmn.nnx


class _Place(NamedTuple):
    """Where nmn keeps a parameter of ours: its name, and how its array becomes ours and back."""

    name: str
    load: Move
    save: Move


def from_nmn(state: Mapping[str, Any], framework: str, layer: YatUnit) -> None:
    """Overwrite the parameters of `layer` with those of an nmn layer that has the same options.

    Args:
      state: of nmn.nnx `nnx.to_pure_dict(nnx.state(theirs))`, of nmn.torch `theirs.state_dict()`, of nmn.linen
        `variables["params"]`; nested, or flat with dotted names. Random streams, caches and tables of rotations in it
        are passed over.
      framework: "nnx", "torch" or "linen".
      layer: a `YatNMN`, `YatConv`, `YatConvTranspose`, `YatEmbed` or `YatAttention`. torch's padding p of a transposed
        convolution is ours of (k − 1) · dilation − p on both sides, its output_padding to be added to the second.

    Raises:
      ValueError: the state lacks parameters of the layer, has others, or has them in another shape.
    """
    arrays = _flatten(state)
    _check_constant(arrays, layer)
    arrays = {k: v for k, v in arrays.items() if not k.startswith(_NO_PARAMETERS)}
    parameters = _parameters(layer)
    places = {ours: _place(ours, framework, layer) for ours in parameters}
    wanted = {place.name for place in places.values()}
    if wanted != arrays.keys():
        raise ValueError(
            f"state lacks {sorted(wanted - arrays.keys())} and has {sorted(arrays.keys() - wanted)}, which a "
            f"{type(layer).__name__} with these options has not; make both layers with the same options."
        )
    loaded = {}
    for ours, place in places.items():
        array, shape = np.asarray(arrays[place.name], np.float32), parameters[ours].shape
        there = place.save(np.zeros(shape, np.float32)).shape
        if array.shape != there:
            raise ValueError(
                f"{place.name} is {array.shape} in state and {ours} is {shape} in the layer, which is {there} in "
                f"nmn.{framework}; make both layers of the same sizes."
            )
        loaded[ours] = np.broadcast_to(place.load(array), shape)
    flat: Any = {tuple(ours.split(".")): p.replace(jnp.asarray(loaded[ours])) for ours, p in parameters.items()}
    nnx.update(layer, nnx.from_flat_state(flat))


def to_nmn(layer: YatUnit, framework: str) -> Arrays:
    """Return the parameters of `layer` as nmn's `framework` names and lays them out: float32, flat, dotted names.

    torch takes it as a state_dict of tensors; for nnx and linen, `flax.traverse_util.unflatten_dict(..., sep=".")`.

    Raises:
      ValueError: nmn has no such layer, or `alpha` or `epsilon_param` differ between heads, of which nmn has one.
    """
    saved = {}
    for ours, parameter in _parameters(layer).items():
        place, array = _place(ours, framework, layer), np.asarray(parameter[...], np.float32)
        if place.save is _one and np.any(array != array.flat[0]):
            raise ValueError(f"{ours} is {array}; nmn has one number for all heads, so they must be equal.")
        saved[place.name] = np.ascontiguousarray(place.save(array))
    return saved


def _flatten(state: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in state.items():
        flat.update(_flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value})
    return flat


def _parameters(layer: YatUnit) -> dict[str, Any]:
    state = nnx.state(layer, (nnx.Param, FrozenParam))
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def _check_constant(arrays: Mapping[str, Any], layer: YatUnit) -> None:
    """Compare the one constant that nmn keeps in its state, α = √2, with the layer's."""
    if _CONSTANT_ALPHA not in arrays:
        return
    theirs = float(np.asarray(arrays[_CONSTANT_ALPHA]))
    if layer.alpha is not None or not np.isclose(layer.constant_alpha, theirs, rtol=1e-6):
        ours = "learned" if layer.alpha is not None else layer.constant_alpha
        raise ValueError(
            f"alpha is {theirs} in state and {ours} in the layer; make the layer with constant_alpha=True."
        )


def _place(ours: str, framework: str, layer: YatUnit) -> _Place:
    """Return where nmn's `framework` keeps the parameter `ours` of `layer`."""
    if framework not in FRAMEWORKS:
        raise ValueError(f"framework is {framework!r}; it must be one of {', '.join(FRAMEWORKS)}.")
    if not isinstance(layer, _LAYERS):
        known = ", ".join(kind.__name__ for kind in _LAYERS)
        raise ValueError(f"layer is a {type(layer).__name__}; nmn has {known} only.")
    module, _, leaf = ours.rpartition(".")
    if module == "kernel_bank":
        if framework == "linen":
            raise ValueError("layer has a kernel_bank; nmn.linen has no banks, nmn.nnx and nmn.torch have.")
        module = ""
    if isinstance(layer, YatAttention):
        module = _projection(module, framework, layer.rope_theta is not None)
    name = "weight" if framework == "torch" and leaf == "kernel" else leaf
    load, save = _kernel_moves(ours, framework, layer) if leaf == "kernel" else (_same, _same)
    if not module and leaf in ("alpha", "epsilon_param"):
        save = _one
    return _Place(f"{module}.{name}" if module else name, load, save)


def _projection(module: str, framework: str, rotary: bool) -> str:
    if rotary and framework != "nnx":
        raise ValueError(f"layer rotates (rope_theta); nmn.{framework} has no rotary attention, only nmn.nnx has.")
    names = _TORCH_PROJECTIONS if framework == "torch" else _ROTARY_PROJECTIONS if rotary else {}
    return names.get(module, module)


def _kernel_moves(ours: str, framework: str, layer: YatUnit) -> tuple[Move, Move]:
    """Return how nmn's kernel becomes ours, and back."""
    if isinstance(layer, YatNMN):
        return (_same, _same) if framework == "nnx" else (np.transpose, np.transpose)
    if isinstance(layer, YatConv):
        return (_same, _same) if framework != "torch" else (_torch_last(-1, -2), _torch_first(-1, -2))
    if isinstance(layer, YatConvTranspose):
        if framework == "torch":
            if layer.transpose_kernel:
                return _torch_last(-1, -2), _torch_first(-1, -2)
            last, first = _torch_last(-2, -1), _torch_first(-2, -1)
            return lambda a: _mirror(last(a)), lambda a: first(_mirror(a))
        turn = layer.transpose_kernel and framework == "linen"
        return (_turn, _turn) if turn else (_same, _same)
    if framework == "torch":
        return np.transpose, np.transpose
    if isinstance(layer, YatAttention) and framework == "nnx" and ours == "out.kernel" and layer.rope_theta is None:
        heads = layer.num_heads
        return lambda a: a.reshape(-1, a.shape[-1]), lambda a: a.reshape(heads, -1, a.shape[-1])
    return _same, _same


def _same(a: Any) -> Any:
    return a


def _torch_last(first: int, second: int) -> Move:
    """Return the move of torch's first two axes, those of channels, to the places given."""
    return lambda a: np.moveaxis(a, (0, 1), (first, second))


def _torch_first(first: int, second: int) -> Move:
    return lambda a: np.moveaxis(a, (first, second), (0, 1))


def _mirror(a: Any) -> Any:
    """Reverse the window of a kernel (k..., ·, ·): torch counts that of a transposed convolution from its end."""
    return np.flip(a, tuple(range(a.ndim - 2)))


def _turn(a: Any) -> Any:
    return np.swapaxes(_mirror(a), -1, -2)


def _one(a: Any) -> Any:
    return a.reshape(-1)[:1]
