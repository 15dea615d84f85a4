"""What is told of a network's ⵟ units as it trains: one compiled program, a forward pass of a few rows of a batch."""

import math
from typing import Any

import jax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding

from aether import parallel
from aether.config import Config
from aether.explain.telemetry import Packing, told
from aether.losses import Loss
from aether.train.step import STOP, Batch


class Units:
    """The numbers of `aether.explain.telemetry`, for the shapes of a run.

    It sees the first rows of each device's share of the batch, as many of each as make `train.telemetry_rows` at least,
    without dropout and mixing, and changes nothing: training is the same to the bit with it and without.

    Args:
      config: resolved.
      graph: of the model.
      loss: calls the model on a batch; its own numbers are not computed.
      like: the shapes and shardings of the training state.
      shapes: of a global batch, as it comes from the loader.
      mesh: where both lie.
    """

    def __init__(
        self, config: Config, graph: nnx.GraphDef, loss: Loss, like: Any, shapes: dict[str, Any], mesh: Mesh
    ) -> None:
        self._packing = Packing()
        ways = math.prod(mesh.shape[axis] for axis in parallel.ROWS)
        each = -(-config.train.telemetry_rows // ways)

        def first(value: Array) -> Array:
            return value.reshape(ways, -1, *value.shape[1:])[:, :each].reshape(ways * each, *value.shape[1:])

        def look(params: Any, extras: Any, batch: Batch) -> Array:
            few = {name: first(value) for name, value in batch.items()}
            return self._packing.pack(told(nnx.merge(graph, params, extras), lambda model: loss(model, few, None)))

        with jax.set_mesh(mesh):
            program = jax.jit(look, out_shardings=NamedSharding(mesh, parallel.P()))
            shapes = {name: shape for name, shape in shapes.items() if name != STOP}
            self.program = program.lower(like.params, like.extras, shapes).compile()

    def __call__(self, state: Any, batch: Batch) -> Array:
        """Return the numbers as the devices will have them."""
        return self.program(state.params, state.extras, batch)

    def fetched(self, numbers: Array) -> dict[str, dict[str, float]]:
        """Wait for the numbers and return them by layer and name."""
        return self._packing.unpack(jax.device_get(numbers))
