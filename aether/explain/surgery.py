"""Change how many hidden ⵟ units a network has: add some that it does not notice, remove some, merge equal ones.

What is changed are arrays by the path of their parameter, `blocks/mlp/hidden/kernel`: parameters, averages of them, or
an optimizer's moments, so that all of a run follow. The blocks of a transformer are stacked, as are those of a ResNet's
stage but the first, and `model.hidden` is one number: every block gets or loses as many units, and in stage k of a
ResNet 2^k times as many as in the first.

The readout of a ResNet's block, a convolution, is used less the mean of each kernel (`aether.nn.Conv`, `zero_sum`). So
that this mean does not depend on how many units there are, it is taken off what is stored.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from aether.errors import InputError
from aether.explain.layers import layers_of
from aether.models.resnet import ResNet

Arrays = dict[str, np.ndarray]
Pair = tuple[int, int]
VALUES, FIRST, SECOND = "values", "first moments", "second moments"
ROLES = _HIDDEN, _BIAS, _OUT = "hidden/kernel", "hidden/bias", "out/kernel"  # the arrays with an axis of units


class Place(NamedTuple):
    """Where the arrays of a hidden ⵟ layer and of the linear map behind it are.

    Attributes:
      stack: the path that both share, `blocks/mlp` or `stages/0/rest`.
      block: in the leading axis of stacked ones; None: there is no such axis.
      units: that it has.
      share: of these for each of `model.hidden`.
      centred: whether the linear map is used less its mean.
    """

    stack: str
    block: int | None
    units: int
    share: int
    centred: bool


def places_of(model: Any) -> dict[str, Place]:
    """Return the hidden ⵟ layers that can be changed, by the names of `aether.explain.layers.layers_of`.

    Raises:
      InputError: there are none.
    """
    found = {}
    for name, layer in layers_of(model).items():
        part, *at = name.split(".")
        if at[-1:] != ["hidden"]:
            continue
        units = layer.kernel_shape[-1]
        if isinstance(model, ResNet):
            stage, block = int(at[0]), int(at[1])
            stack = f"{part}/{stage}/{'rest' if block else 'first'}"
            found[name] = Place(stack, block - 1 if block else None, units, 2**stage, True)
        else:
            found[name] = Place(f"{part}/mlp", int(at[0]), units, 1, False)
    if not found:
        c = model.config
        raise InputError(f"A network with model.kind={c.kind} and model.mlp={c.mlp} has no hidden ⵟ units to change.")
    return found


def added(arrays: Arrays, places: Mapping[str, Place], centres: Mapping[str, np.ndarray], what: str = VALUES) -> Arrays:
    """Return arrays with units more: their centres as given, b the mean of the layer's (as it is stored), readout 0.

    Moments of the new ones are 0. After many steps Adam's first update of such an entry is
    (1 − beta1)/√(1 − beta2) learning rates long, one by the defaults.

    Args:
      arrays: by path, values or moments; those of other paths stay as they are.
      places: of all hidden layers.
      centres: of each of them, (units, d), the entries of a convolution's in the order of its kernel.
      what: `VALUES`, `FIRST` or `SECOND` moments.

    Raises:
      InputError: centres of another width or of unequal numbers, or of layers that there are not.
    """
    common(places, {name: len(c) for name, c in centres.items()}, "are given")

    def edit(name: str, role: str, a: np.ndarray) -> np.ndarray:
        new = np.asarray(centres[name], np.float32)
        count, width = new.shape
        if role == _HIDDEN and width != a.size // a.shape[-1]:
            raise InputError(f"The centres of {name} have {width} entries; they take {a.size // a.shape[-1]}.")
        axis, zeros = _axis(role), what != VALUES or role == _OUT
        shape = tuple(count if k == axis % a.ndim else n for k, n in enumerate(a.shape))
        more = new.T.reshape(shape) if role == _HIDDEN else np.full(shape, np.mean(a), a.dtype)
        return np.concatenate([a, np.zeros(shape, a.dtype) if zeros else more.astype(a.dtype)], axis)

    return _edited(arrays, places, edit, what)


def removed(
    arrays: Arrays, places: Mapping[str, Place], units: Mapping[str, Sequence[int]], what: str = VALUES
) -> Arrays:
    """Return arrays without these units of each hidden layer.

    What the removed ones added to the stream is gone, and in a ResNet the mean of what is left of a readout too.

    Raises:
      InputError: a unit that there is not or twice, unequal numbers, or no unit is left.
    """
    _check_units(places, units)
    common(places, {name: len(which) for name, which in units.items()}, "are to go")
    return _edited(arrays, places, lambda name, role, a: np.delete(a, list(units[name]), _axis(role)), what)


def merged(
    arrays: Arrays, places: Mapping[str, Place], pairs: Mapping[str, Sequence[Pair]], what: str = VALUES
) -> Arrays:
    """Return arrays in which, of each pair (kept, gone) of units, the first stands for both: its readout is the sum.

    Of equal units the network stays the same. The gradient of the one's centre and b is the sum of those of both, so
    their first moments are added and second ones m become (√m + √m')², the largest that they can be; the gradient of
    its readout is that of either, so those moments are the kept one's.

    Args:
      arrays: by path, values or moments.
      places: of all hidden layers.
      pairs: of each of them; a unit that is kept may stand for several, but may not go.
      what: `VALUES`, `FIRST` or `SECOND` moments.

    Raises:
      InputError: as in `removed`, or a unit that goes is to be kept.
    """
    gone = {name: [g for _, g in each] for name, each in pairs.items()}
    _check_units(places, gone)
    _check_units(places, {name: sorted({k for k, _ in each}) for name, each in pairs.items()})
    for name, each in pairs.items():
        if both := sorted({k for k, _ in each} & set(gone[name])):
            raise InputError(f"Unit {both[0]} of {name} is to be kept and to go; merge others into one that stays.")
    common(places, {name: len(each) for name, each in gone.items()}, "are to go")

    def edit(name: str, role: str, a: np.ndarray) -> np.ndarray:
        rows = np.moveaxis(a, _axis(role), 0).copy()
        if (role == _OUT) == (what == VALUES):
            power = 2 if what == SECOND else 1
            for kept, other in pairs[name]:
                rows[kept] = (rows[kept] ** (1 / power) + rows[other] ** (1 / power)) ** power
        return np.moveaxis(np.delete(rows, gone[name], 0), 0, _axis(role))

    return _edited(arrays, places, edit, what)


def common(places: Mapping[str, Place], counts: Mapping[str, int], verb: str) -> int:
    """Return by how much `model.hidden` changes if of each layer as many units as `counts` says come or go.

    Raises:
      InputError: that is not one number above 0, a layer is missing, or one is not there.
    """
    if unknown := [name for name in counts if name not in places]:
        raise InputError(f"There is no hidden ⵟ layer {unknown[0]!r}; there are {', '.join(places)}.")
    change = {name: counts.get(name, 0) / place.share for name, place in places.items()}
    less, more = min(change, key=change.__getitem__), max(change, key=change.__getitem__)
    if change[less] != change[more] or change[less] != int(change[less]) or not change[less]:
        raise InputError(
            f"Of {less} {counts.get(less, 0)} units {verb} and of {more} {counts.get(more, 0)}; blocks share one "
            "model.hidden, so all change by as many, at least one, and those of stage k of a ResNet by 2^k times as "
            "many as the first stage's."
        )
    return int(change[less])


def _axis(role: str) -> int:
    """Return the axis of the units."""
    return -2 if role == _OUT else -1


def _centred(kernel: np.ndarray) -> np.ndarray:
    """Return a kernel less the mean of each of its columns.

    What rounding adds to a sum goes to the column's smallest entry, which is the finest: a new unit, whose readout is
    this mean, may respond a thousand times as strongly as others.
    """
    flat = kernel.reshape(-1, kernel.shape[-1]).astype(np.float64)
    flat = (flat - flat.mean(0)).astype(np.float32)
    smallest = np.argmin(np.abs(flat), 0), np.arange(flat.shape[-1])
    flat[smallest] -= flat.sum(0, dtype=np.float64)
    return flat.reshape(kernel.shape)


def _check_units(places: Mapping[str, Place], units: Mapping[str, Sequence[int]]) -> None:
    for name, which in units.items():
        count = places[name].units if name in places else 0  # `common` tells of a layer that is not there
        if count and (wrong := [u for u in which if not 0 <= u < count]):
            raise InputError(f"There is no unit {wrong[0]} in {name}; it has units 0 to {count - 1}.")
        if len(set(which)) < len(which):
            twice = next(u for k, u in enumerate(which) if u in which[:k])
            raise InputError(f"Unit {twice} of {name} is named twice; name each once.")
        if count and len(which) >= count:
            raise InputError(f"All {count} units of {name} are named; at least one has to stay.")


def _edited(arrays: Arrays, places: Mapping[str, Place], edit: Callable[..., np.ndarray], what: str) -> Arrays:
    """Return arrays with edit(layer, role, its own array) in the place of each one of a hidden layer."""
    done = dict(arrays)
    for stack in {place.stack: None for place in places.values()}:
        layers = [name for name, place in places.items() if place.stack == stack]  # in the order of the blocks
        for role in ROLES:
            key = f"{stack}/{role}"
            if key not in arrays:  # no bias, or an optimizer that treats it apart
                continue
            parts = []
            for name in layers:
                part = arrays[key] if places[name].block is None else arrays[key][places[name].block]
                if places[name].centred and role == _OUT and what == VALUES:
                    part = _centred(part)
                parts.append(edit(name, role, part))
            done[key] = parts[0] if places[layers[0]].block is None else np.stack(parts)
    return done
