"""A trained run with more hidden ⵟ units, or fewer: parameters, averages and the optimizer's state change alike."""

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from aether.arrays import named_leaves
from aether.checkpoint import Checkpoints
from aether.config import Config, differences, dumps
from aether.data.corpus import TOKENIZER
from aether.data.images.load import CLASSES
from aether.errors import InputError
from aether.evaluate.load import Run, load_run
from aether.evaluate.run import own_corpus, validation_examples
from aether.explain import surgery
from aether.explain.centres import drawn
from aether.explain.duplicates import equal_units
from aether.explain.surgery import Arrays, Place, places_of
from aether.losses import scaled
from aether.storage import filled, new_folder
from aether.train.setup import describe_state
from aether.train.spikes import LEFT_OUT
from aether.train.step import TrainState
from aether.workdir import CHECKPOINTS, Workdir

_ROWS = 8  # examples at once, of which centres are drawn
_EXAMPLES = 64  # of them altogether

_VALUES = ("params/", "ema/")  # of the parts of a state

Edit = Callable[..., Arrays]  # of arrays by path, and what they are


def operate(
    workdir: str,
    out: str,
    *,
    step: int | None = None,
    grow: int = 0,
    remove: Mapping[str, Sequence[int]] | None = None,
    merge: float | None = None,
    data: str | None = None,
    noise: float = 0.0,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Make a run folder `out` of a run, with another number of hidden units, from which `launch.train` goes on.

    Exactly one of `grow`, `remove` and `merge` says how. The step, the data's order and all that is not of hidden units
    stay as they are; `model.hidden` in the config changes.

    Args:
      workdir: the run; it may be training, and nothing in it is changed.
      out: a new local folder.
      step: of the checkpoint; the last by default.
      grow: add so many units to each block (2^k times as many in stage k of a ResNet), which change no output: their
        readout is 0. Their centres are drawn from what the layer is given of training data.
      remove: the units of each hidden layer that go, as many of each; see `aether.explain.surgery`.
      merge: the tolerance within which units count as equal (`aether.explain.duplicates.equal_units`). As many of each
        block are merged as all have.
      data: to draw centres from, as `launch.evaluate` takes it; by default the run's training data.
      noise: see `aether.nn.prototypes.draw_prototypes`.
      log: takes a line about what was done.

    Returns:
      "step", "hidden", the config's number before and after, and "changed", by layer the units that are new, gone, or
      merged as pairs (kept, gone).

    Raises:
      InputError: there is no such run, layer or unit, the network has no hidden ⵟ units, what is asked would leave
        blocks with different numbers of them, or `out` has something in it.
      StorageError: the checkpoint cannot be read, or `out` not be written.
    """
    if [grow > 0, bool(remove), merge is not None].count(True) != 1 or (merge or 0.0) < 0.0:
        raise InputError(f"grow is {grow}, remove {remove} and merge {merge}; give one of them, above 0 or of units.")
    target = new_folder(out, "out")
    run = load_run(workdir, step, average="none")
    source, model = Workdir(workdir, primary=False), nnx.merge(run.graph, run.params)
    places = places_of(model)
    leaves = _read(run, source)
    groups = _groups(leaves, places)
    edit: Edit
    if grow:
        edit, changed = _growth(run, model, grow, data, noise)
    elif remove:
        edit, changed = partial(surgery.removed, places=places, units=remove), dict(remove)
    else:
        edit, changed = _merger(groups, model, merge or 0.0)
    for prefix, arrays in groups.items():
        new = edit(arrays, what=_meaning(prefix))
        leaves |= {prefix + path: array for path, array in new.items()}
    change = surgery.common(places, {name: len(each) for name, each in changed.items()}, "change")
    config = _resized(run.config, change if grow else -change)
    state = _state(config, run.mesh, leaves)
    with filled(target) as made:
        _write(made, source, run, config, state)
    hidden = [_resized(run.config, 0).model.hidden, config.model.hidden]
    log(f"model.hidden was {hidden[0]} and is {hidden[1]} in {out}, at step {run.step}")
    return dict(step=run.step, hidden=hidden, changed=changed)


def _resized(config: Config, change: int) -> Config:
    """Return the config with another number of hidden units; a ResNet's that leaves it open has the width's."""
    hidden = (config.model.hidden or config.model.width) + change
    return dataclasses.replace(config, model=dataclasses.replace(config.model, hidden=hidden))


def _read(run: Run, source: Workdir) -> Arrays:
    """Return the arrays of the run's training state by name, in the host's memory."""
    _, _, like = describe_state(run.config, run.mesh)
    state, _ = Checkpoints(source.checkpoints, run.config.checkpoint).read(like, run.step)
    return {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}


def _growth(run: Run, model: Any, count: int, data: str | None, noise: float) -> tuple[Edit, dict]:
    places = places_of(model)
    counts = {name: count * place.share for name, place in places.items()}
    describe_state(_resized(run.config, count), run.mesh)  # refuses what the devices do not divide, before the work
    centres = drawn(model, _inputs(run, data), counts, noise=noise)
    new = {name: list(range(places[name].units, places[name].units + n)) for name, n in counts.items()}
    return partial(surgery.added, places=places, centres=centres), new


def _merger(groups: Mapping[str, Arrays], model: Any, tolerance: float) -> tuple[Edit, dict]:
    places = places_of(model)
    found = equal_units([arrays for prefix, arrays in groups.items() if prefix in _VALUES], model, tolerance)
    most = min(len(pairs) // places[name].share for name, pairs in found.items())
    if not most:
        have = ", ".join(f"{len(pairs)} in {name}" for name, pairs in found.items())
        raise InputError(
            f"With merge={tolerance} there are so many units to spare: {have}; all blocks lose as many, and one has "
            "none. Take a larger tolerance."
        )
    pairs = {name: each[: most * places[name].share] for name, each in found.items()}
    return partial(surgery.merged, places=places, pairs=pairs), pairs


def _inputs(run: Run, data: str | None) -> Iterator[np.ndarray]:
    """Yield inputs of the model in batches, from all over the data."""
    examples = validation_examples(run, data)[1] if data else own_corpus(run).train[0].examples
    picked = np.linspace(0, len(examples) - 1, min(len(examples), _EXAMPLES)).astype(int)
    for start in range(0, len(picked), _ROWS):
        rows = [examples[int(k)] for k in picked[start : start + _ROWS]]
        if run.labels is None:
            yield np.stack([e["tokens"] for e in rows])[:, : run.config.data.context].astype(np.int32)
        else:
            image = run.config.image
            pixels = jnp.asarray(np.stack([e["images"] for e in rows]))
            yield np.asarray(scaled(pixels, image.mean, image.std))


def _groups(leaves: Arrays, places: Mapping[str, Place]) -> dict[str, Arrays]:
    """Return what hidden units have of a state's arrays: {"opt_state/1/0/mu/": {"blocks/mlp/out/kernel": array}}."""
    stacks = {place.stack for place in places.values()}
    paths = [f"{stack}/{role}" for stack in stacks for role in surgery.ROLES]
    groups: dict[str, Arrays] = {}
    for name, leaf in leaves.items():
        for path in paths:
            if name.endswith(f"/{path}"):
                groups.setdefault(name.removesuffix(path), {})[path] = leaf
    return groups


def _meaning(prefix: str) -> str:
    """Return what the arrays of a group are, of `surgery.VALUES`, `FIRST` and `SECOND`."""
    if prefix in _VALUES:
        return surgery.VALUES
    return {"mu": surgery.FIRST, "nu": surgery.SECOND}[prefix.rstrip("/").rpartition("/")[2]]


def _state(config: Config, mesh: Mesh, leaves: Arrays) -> TrainState:
    """Return the state of this config with these arrays, spread over the devices."""
    _, _, like = describe_state(config, mesh)
    wanted = named_leaves(like)
    assert {name: leaf.shape for name, leaf in wanted.items()} == {name: leaf.shape for name, leaf in leaves.items()}
    values = [jax.device_put(leaves[name], leaf.sharding) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), values)


def _write(made: Path, source: Workdir, run: Run, config: Config, state: TrainState) -> None:
    """Fill a run's folder: config, what it must know of its data, the checkpoint."""
    if run.labels is None:
        shutil.copytree(source.local / TOKENIZER, made / TOKENIZER)
    for name in (CLASSES, LEFT_OUT):
        if source.exists(name):
            shutil.copy(source.local / name, made / name)
    record = source.read_json("config.json")
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    made_now = [{"time": now, "key": k, "from": was, "to": to} for k, was, to, _ in differences(run.config, config)]
    record |= dict(config=config.to_json(), changes=[*record["changes"], *made_now])
    (made / "config.json").write_text(dumps(record), encoding="utf-8")
    checkpoints = Checkpoints(str(made / CHECKPOINTS), config.checkpoint)
    checkpoints.save(run.step, state, meta={})
    checkpoints.close()
