"""Devices that are not here: of a TPU topology through its compiler, or CPU devices in place of GPUs."""

import os
from collections.abc import Sequence
from typing import Any

from aether.chips import Topology
from aether.errors import InputError

# What libtpu asks for when it is loaded where no TPU is; without answers it complains on stderr.
NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
ENVIRONMENT = {
    **NO_TPU,
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # compile_seconds is to be what a compilation takes
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans at once
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
MOST_FAKE = 64  # GPUs; more than that takes minutes to compile for, on two cores


def prepare(topologies: Sequence[Topology], debug: bool = False) -> None:
    """Set the environment that `devices_of` needs; before JAX is imported.

    Raises:
      InputError: more GPUs than a CPU can stand in for.
    """
    os.environ.update(ENVIRONMENT)
    if debug:
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "0"
    fakes = [t.chips for t in topologies if not t.is_tpu]
    if fakes and max(fakes) > MOST_FAKE:
        raise InputError(
            f"--topology has {max(fakes)} GPUs, which CPU devices stand in for; give at most {MOST_FAKE} (a multiple "
            "of them differs in mesh.data alone)."
        )
    if fakes:
        os.environ["JAX_NUM_CPU_DEVICES"] = str(max(fakes))


def devices_of(topology: Topology) -> list[Any]:
    """Return the devices of a topology: compile-only ones of TPUs, or this process's CPU devices in place of GPUs.

    Raises:
      InputError: the TPU compiler is not installed, or this process has too few CPU devices.
    """
    import jax
    from jax.experimental import topologies

    if not topology.is_tpu:
        devices = jax.devices("cpu")
        if len(devices) < topology.chips:
            raise InputError(
                f"--topology has {topology.chips} GPUs but this process has {len(devices)} CPU devices to stand in "
                "for them; set JAX_NUM_CPU_DEVICES before it starts."
            )
        return list(devices[: topology.chips])
    name = f"{topology.generation}:{'x'.join(str(n) for n in topology.shape)}"
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.generation == "v4":
        options["chip_config_name"] = "megacore"  # two cores that JAX sees as one device, as on real machines
    if topology.shape == (1, 1):
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in ("libtpu", "not found", "not installed")):
            raise
        raise InputError(
            f"--topology is {topology}, whose compiler is not installed; pip install 'aether[plan]' brings it."
        ) from error
