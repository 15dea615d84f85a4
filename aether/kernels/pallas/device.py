"""Where what is being traced will run: known before it is compiled, so that a kernel can be chosen then."""

from typing import NamedTuple

import jax


class Device(NamedTuple):
    """A platform, "cpu", "gpu" or "tpu", and a kind of device, such as "TPU v5 lite"."""

    platform: str
    kind: str


def device() -> Device:
    """Return what the mesh in force consists of, that of `jax.set_mesh`, else the default device."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.abstract_device is not None:
        return Device(_plain(mesh.abstract_device.platform), mesh.abstract_device.device_kind)
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    if isinstance(default, str):
        default = jax.devices(default)[0]
    default = default or jax.devices()[0]
    return Device(_plain(default.platform), default.device_kind)


def _plain(platform: str) -> str:
    return "gpu" if platform in ("cuda", "rocm") else platform
