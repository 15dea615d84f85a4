"""The device that `python -m tools.bench` compiles for: of this machine, or a TPU that is not here; and its memory."""

import os
import platform
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from aether.errors import InputError

SHARE = 0.9  # of the memory that is free
PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}  # --backend -> JAX_PLATFORMS


@dataclass(frozen=True)
class Where:
    """The device that programs are compiled for: of this machine, or with `topology` one that is not here."""

    device: Any
    topology: Any
    memory: int  # bytes that a contender may need

    @property
    def mesh(self) -> Any:
        """Return the mesh of this one device."""
        from aether import parallel
        from aether.config import MeshConfig

        return parallel.make_mesh(MeshConfig(), [self.device])

    @property
    def on_cpu(self) -> bool:
        """Say whether the shapes are to be small."""
        return self.device.platform == "cpu"


def here(backend: str, memory: float) -> Where:
    """Return this machine's device; `memory` in GiB, 0 for what is free.

    Raises:
      InputError: there is no such device.
    """
    if backend:
        os.environ["JAX_PLATFORMS"] = PLATFORMS[backend]
    import jax

    try:
        device = jax.devices()[0]
    except (RuntimeError, AssertionError) as error:  # the latter where cuda finds no GPU
        why = str(error).split("\n")[0]
        raise InputError(
            f"--backend is {backend or 'not given'}, but JAX finds no such device here{f' ({why})' * bool(why)}; "
            "leave it out, or install the JAX that goes with the device."
        ) from None
    return Where(device, None, int(memory * 2**30) or int(SHARE * free_memory(device)))


def absent(text: str, memory: float, debug: bool) -> Where:
    """Return one device of the TPU topology `text`, known to its compiler alone.

    Raises:
      InputError: there is no such topology, or no compiler for it.
    """
    from aether.chips import topology
    from aether.plan import machine

    try:
        target = topology(text)
    except InputError as error:
        raise InputError(str(error).replace("--topology", "--compile_only")) from None
    if not target.is_tpu:
        raise InputError(f"--compile_only is {text!r}, which has no compiler here; give a TPU, such as v5e:2x2.")
    machine.prepare([target], debug)
    return Where(machine.devices_of(target)[0], target, int(memory * 2**30) or target.chip.usable)


def free_memory(device: Any) -> int:
    """Return the bytes that are free on the device, on a CPU those that the system could hand out."""
    if device.platform != "cpu":
        stats = device.memory_stats()
        return int(stats["bytes_limit"] - stats["bytes_in_use"])
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        raise InputError("This system does not say how much memory is free; give it in GiB, as in --memory=8.")
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def machine(where: Where) -> dict[str, Any]:
    """Return where and when a row was measured."""
    return dict(
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        device=where.device.device_kind,
        compile_only=str(where.topology) if where.topology else None,
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        **{name: _version(name) for name in ("jax", "jaxlib", "libtpu", "nmn")},
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
