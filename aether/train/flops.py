"""Model FLOPs utilisation."""

from typing import Any

import jax
from flax import nnx

from aether.chips import chip_of
from aether.config import Config


def matrix_parameters(params: Any) -> int:
    """Count the entries of the matrices that activations are multiplied by: block kernels and the head."""
    flat = dict(nnx.to_flat_state(params))
    tied = ("head", "kernel") not in flat
    return sum(v.size for path, v in flat.items() if path[-1] == "kernel" or (tied and path == ("embed", "embedding")))


def flops_per_token(config: Config, params: Any) -> int:
    """Return 6 · (matrix parameters) + 12 · layers · width · context, forward and backward, for either model."""
    m = config.model
    return 6 * matrix_parameters(params) + 12 * m.layers * m.width * config.data.context


def peak_flops(devices: list[jax.Device]) -> float | None:
    """Return the devices' bf16 peak together, FLOP/s, or None where it is unknown (a CPU)."""
    chip = chip_of(devices[0].device_kind)
    return chip.peak / chip.devices * len(devices) if chip else None
