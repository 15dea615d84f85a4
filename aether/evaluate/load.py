"""A trained model, read back from its run folder."""

from dataclasses import dataclass, field
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from aether.checkpoint import Checkpoints
from aether.config import Config, MeshConfig, build
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
      params: all that the module holds; averages where the run keeps them (`train.ema`).
      tokenizer: the run's own copy; None for images.
      labels: of images, the run's own copy; None for texts.
      mesh: where the parameters lie.
    """

    workdir: str
    step: int
    config: Config
    graph: nnx.GraphDef = field(repr=False)
    params: Any = field(repr=False)
    tokenizer: Tokenizer | None = field(repr=False)
    labels: Labels | None
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
    images = config.model.task == "classify"
    tokenizer = None if images else restore_tokenizer(str(folder.local / TOKENIZER))
    labels = Labels.restore(str(folder.local)) if images else None
    mesh = mesh or _mesh(config.mesh)
    graph, *shapes = describe_model(config)
    params, extras = (placed(part, mesh, config.mesh) for part in shapes)
    params, found = checkpoints.restore_model(params, extras, step, averaged=bool(config.train.ema))
    return Run(workdir, found, config, graph, params, tokenizer, labels, mesh)


def _config(folder: Workdir) -> Config:
    record = folder.read_json("config.json")
    try:
        return build(record["config"])
    except (InputError, KeyError, TypeError) as e:
        raise InputError(f"{folder.path}/config.json is not the record of a run that this Aether can read: {e}") from e


def _mesh(c: MeshConfig) -> Mesh:
    try:
        return make_mesh(c)
    except InputError:  # trained on another number of devices
        return make_mesh(MeshConfig())
