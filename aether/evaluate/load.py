"""A trained model, read back from its run folder."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from aether.checkpoint import Checkpoints
from aether.config import Config, MeshConfig, build_saved
from aether.data.corpus import TOKENIZER
from aether.data.images.load import Labels
from aether.data.tokenizers import Tokenizer, restore_tokenizer
from aether.errors import InputError
from aether.models import describe_model
from aether.parallel import make_mesh, placed
from aether.workdir import Workdir


@dataclass(frozen=True)
class Run:
    """A model at one step of its training.

    Attributes:
      workdir: the folder, as it was given.
      step: of the checkpoint.
      config: resolved, from config.json.
      graph: of the model; `nnx.merge(graph, params)` is the module.
      params: all that the module holds.
      tokenizer: the run's own copy; None for images.
      labels: of images, the run's own copy; None for texts.
      mesh: where the parameters lie.
      average: what `params` are: none (as trained), ema, or last:K.
    """

    workdir: str
    step: int
    config: Config
    graph: nnx.GraphDef = field(repr=False)
    params: Any = field(repr=False)
    tokenizer: Tokenizer | None = field(repr=False)
    labels: Labels | None
    mesh: Mesh
    average: str = "none"


def load_run(
    workdir: str, step: int | None = None, *, mesh: Mesh | None = None, average: str = "auto", flag: str = "workdir"
) -> Run:
    """Load a run for use, the last checkpoint by default; nothing in the folder is changed.

    Args:
      workdir: a folder, or gs:// or s3://.
      step: of the checkpoint.
      mesh: to spread the parameters over; by default the run's own where it fits the devices here, else all of them
        along data.
      average: the parameters as trained (none), their moving average (ema), the mean over the last K checkpoints up
        to `step` (last:K), or (auto) the moving average where the run keeps one (`train.ema`).
      flag: what a person gave the folder by, for messages.

    Raises:
      InputError: there is no such run or checkpoint, it is not one that this version can build, or there is no such
        average of it.
      StorageError: the checkpoint cannot be read.
    """
    count = _last(average)
    folder = Workdir(workdir, primary=False, flag=flag)
    if not folder.exists():
        raise InputError(f"--{flag} is {workdir}, but there is no run (it has no config.json); give the folder of one.")
    config = _config(folder)
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint)
    if not checkpoints.steps():
        raise InputError(f"The run in {workdir} has no checkpoint yet; let it train until it saves one.")
    if average == "auto":
        average = "ema" if config.train.ema else "none"
    if average == "ema" and not config.train.ema:
        raise InputError(
            f"--average is ema, but the run in {workdir} keeps no moving average (train.ema=0); take none or last:K."
        )
    images = config.model.task == "classify"
    tokenizer = None if images else restore_tokenizer(str(folder.local / TOKENIZER))
    labels = Labels.restore(str(folder.local)) if images else None
    mesh = mesh or mesh_of(config.mesh)
    graph, *shapes = describe_model(config)
    params, extras = (placed(part, mesh, config.mesh) for part in shapes)
    if count:
        steps = checkpoints.last(count, step)
        params, found = _mean(checkpoints, params, extras, steps), steps[-1]
    else:
        params, found = checkpoints.restore_model(params, extras, step, averaged=average == "ema")
    return Run(workdir, found, config, graph, params, tokenizer, labels, mesh, average)


def _last(average: str) -> int:
    """Return K of last:K, 0 of the others."""
    kind, _, count = average.partition(":")
    if average in ("auto", "none", "ema"):
        return 0
    if kind == "last" and count.isascii() and count.isdecimal() and int(count) > 0:
        return int(count)
    raise InputError(f"--average is {average!r}; it takes auto, none, ema, or last:K with K of at least 1.")


def _mean(checkpoints: Checkpoints, params: Any, extras: Any, steps: list[int]) -> Any:
    """Return the mean over checkpoints, read one after another: the mean so far and one more are in memory.

    What is no float, a counter, is the last one's.
    """
    mean: Any = None
    for n, step in enumerate(steps, 1):
        one, _ = checkpoints.restore_model(params, extras, step, averaged=False)
        mean = one if mean is None else _blend(mean, one, n)
        del one  # before the next is read
    return mean


@partial(jax.jit, donate_argnums=0)
def _blend(mean: Any, one: Any, n: int) -> Any:
    """Return the mean of n from the mean of n − 1 and the n-th."""

    def blend(m: jax.Array, x: jax.Array) -> jax.Array:
        return m + ((x - m) / n).astype(m.dtype) if jnp.issubdtype(m.dtype, jnp.floating) else x

    return jax.tree.map(blend, mean, one)


def _config(folder: Workdir) -> Config:
    record = folder.read_json("config.json")
    try:
        return build_saved(record["config"])
    except (InputError, KeyError, TypeError) as e:
        raise InputError(f"{folder.path}/config.json is not the record of a run that this Aether can read: {e}") from e


def mesh_of(c: MeshConfig) -> Mesh:
    """Make the mesh of a run, or one of all devices here along data where that does not fit them."""
    try:
        return make_mesh(c)
    except InputError:  # trained on another number of devices
        return make_mesh(MeshConfig())
