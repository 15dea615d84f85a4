"""Model FLOPs utilisation."""

from typing import Any

import jax
from flax import nnx

from aether.config import Config

# Dense bf16 peak, FLOP/s a chip, from the vendors' data sheets.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


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
    kind = devices[0].device_kind
    names = [name for name in PEAKS if kind.startswith(name)]
    return PEAKS[max(names, key=len)] * len(devices) if names else None
