"""A trained model, read back from its run folder."""

from dataclasses import dataclass, field
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from aether.checkpoint import Checkpoints
from aether.config import Config, MeshConfig, build
from aether.data.tokenizers import Tokenizer, restore_tokenizer
from aether.errors import InputError
from aether.models import MODELS
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
      params: the averaged ones where the run keeps them (`train.ema`).
      tokenizer: the run's own copy.
      mesh: where the parameters lie.
    """

    workdir: str
    step: int
    config: Config
    graph: nnx.GraphDef = field(repr=False)
    params: Any = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)
    mesh: Mesh


def load_run(workdir: str, step: int | None = None, *, mesh: Mesh | None = None) -> Run:
    """Load a run for use, the last checkpoint by default; nothing in the folder is changed.

    Args:
      workdir: a folder, or gs:// or s3://.
      step: of the checkpoint.
      mesh: to spread the parameters over; by default the run's own where it fits the devices here, else all of them
        along data.

    Raises:
      InputError: there is no such run or checkpoint, or it is not one that this version can build.
      StorageError: the checkpoint cannot be read.
    """
    folder = Workdir(workdir, primary=False)
    if not folder.exists():
        raise InputError(
            f"--workdir is {workdir}, but there is no run (it has no config.json); give the folder of one."
        )
    config = _config(folder)
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint)
    if not checkpoints.steps():
        raise InputError(f"The run in {workdir} has no checkpoint yet; let it train until it saves one.")
    tokenizer = restore_tokenizer(str(folder.local / "tokenizer"))
    mesh = mesh or _mesh(config.mesh)
    graph, shapes = nnx.split(nnx.eval_shape(lambda: _model(config)))
    part = "ema" if config.train.ema else "params"
    params, _, found = checkpoints.restore_params(placed(shapes, mesh, config.mesh), step, part=part)
    return Run(workdir, found, config, graph, params, tokenizer, mesh)


def _config(folder: Workdir) -> Config:
    record = folder.read_json("config.json")
    try:
        return build(record["config"])
    except (InputError, KeyError, TypeError) as e:
        raise InputError(f"{folder.path}/config.json is not the record of a run that this Aether can read: {e}") from e


def _model(config: Config) -> nnx.Module:
    return MODELS[config.model.kind](config.model, config.data.context, nnx.Rngs(0))


def _mesh(c: MeshConfig) -> Mesh:
    try:
        return make_mesh(c)
    except InputError:  # trained on another number of devices
        return make_mesh(MeshConfig())
