"""One plan: the real training step, compiled for devices that are not here, and what the program says."""

import math
import time
from dataclasses import dataclass, field
from typing import Any

from jax.sharding import Mesh

from aether import parallel
from aether.chips import Topology
from aether.config import Config, Pictures
from aether.data.tokenizers import load_tokenizer
from aether.errors import InputError
from aether.losses import loss_of
from aether.plan.collectives import Collective, collectives
from aether.plan.counts import Counts, count
from aether.plan.layout import Layout
from aether.plan.machine import devices_of
from aether.plan.memory import Memory, measured, refused
from aether.plan.read import parse
from aether.plan.roofline import Roofline, roofline
from aether.train.flops import flops_per_step
from aether.train.setup import batch_shapes, compile_step, describe_state

GPT2_IDS = 50257


@dataclass
class Plan:
    """What a step of `config` needs on `topology`; what the compiler refused has no counts and no roofline."""

    config: Config
    topology: Topology
    mesh: dict[str, int]
    memory: Memory
    fits: bool
    compile_seconds: float
    model_flops: int
    counts: Counts | None = None
    collectives: list[Collective] = field(default_factory=list)
    roofline: Roofline | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def rate_bound(self) -> float | None:
        """Return the tokens or images a second over all devices that no step can exceed."""
        return self.config.per_step / self.roofline.bound if self.roofline and self.roofline.bound else None

    @property
    def mfu_bound(self) -> float | None:
        """Return the share of peak FLOP/s at that rate, by the model's FLOPs."""
        bound = self.roofline.bound if self.roofline else None
        return self.model_flops / bound / (self.topology.chip.peak * self.topology.chips) if bound else None


def vocabulary(config: Config, given: int = 0) -> int:
    """Return the tokenizer's number of ids: `given`, or model.vocab, or what data.tokenizer is known to have.

    Raises:
      InputError: only the text would tell.
    """
    name = config.data.tokenizer
    if given or config.model.vocab:
        return given or config.model.vocab
    if name == "bytes":
        return load_tokenizer(name).vocab_size
    if name.partition(":")[0] == "gpt2":
        return GPT2_IDS
    raise InputError(
        f"data.tokenizer is {name}, whose number of ids a plan cannot know; give it, as in --vocab=32000, or set "
        "model.vocab."
    )


def resolved(config: Config, given: int = 0) -> Config:
    """Decide what a config leaves to data that are not here; `given` as in `vocabulary`, or the classes of images.

    Raises:
      InputError: the config does not say enough.
    """
    if config.unit == "tokens":
        return config.resolved(vocabulary(config, given))
    image, classes = config.image, given or config.model.classes
    if not (image.size and classes):
        raise InputError(
            f"image.size is {image.size} and model.classes {classes}; a plan for images needs both, as in "
            "--config.image.size=224 --config.model.classes=1000."
        )
    return config.resolved(0, Pictures(classes, image.size, image.channels or 3, image.mean or 0.5, image.std or 0.25))


def make_plan(config: Config, topology: Topology, devices: list[Any] | None = None) -> Plan:
    """Compile the training step of a resolved config for `topology` and read the program.

    Raises:
      InputError: mesh, batch or shapes do not divide.
    """
    mesh = parallel.make_mesh(config.mesh, devices_of(topology) if devices is None else devices)
    parallel.check(config, mesh)
    loss = loss_of(config)
    graph, _, like = describe_state(config, mesh)
    sizes = {axis: mesh.shape[axis] for axis in mesh.axis_names}
    common: dict[str, Any] = dict(config=config, topology=topology, mesh=sizes, model_flops=flops_per_step(config))
    begin = time.perf_counter()
    try:
        compiled = compile_step(config, graph, loss, like, mesh)
    except RuntimeError as error:
        memory = refused(str(error), like) if "RESOURCE_EXHAUSTED" in str(error) else None
        if memory is None:
            raise
        seconds = time.perf_counter() - begin
        return Plan(memory=memory, fits=False, compile_seconds=seconds, **common)
    seconds = time.perf_counter() - begin
    memory = measured(compiled, like, batch_shapes(config, mesh))
    module = parse(compiled.as_text())
    found, counts = collectives(module, layout_of(mesh, topology)), count(module)
    warnings = list(dict.fromkeys(module.warnings))
    warnings += [f"custom call {name}: its FLOPs are not counted ({n} a step)" for name, n in counts.uncounted.items()]
    warnings += [
        f"kernel {name}: its FLOPs and bytes are those it states, its cycles are not counted ({n} runs a step)"
        for name, n in counts.stated.items()
    ]
    if not topology.is_tpu:
        warnings.append(
            "GPUs by data sheet: FLOPs and collectives are those of the CPU compiler's program, memory is an estimate, "
            "cycles and HBM traffic are unknown"
        )
        counts.cycles = counts.hbm_bytes = None
    return Plan(
        memory=memory,
        fits=memory.total <= topology.chip.usable,
        compile_seconds=seconds,
        counts=counts,
        collectives=found,
        roofline=roofline(counts, found, topology),
        warnings=warnings,
        **common,
    )


def layout_of(mesh: Mesh, topology: Topology) -> Layout:
    """Return where the partitions of a program over `mesh` lie; the slices of GPUs are their nodes."""
    devices = list(mesh.devices.flat)
    axes = {a: mesh.shape[a] for a in mesh.axis_names}
    if not topology.is_tpu:
        size = math.prod(topology.shape)
        return Layout(axes, tuple(d.id // size for d in devices))
    slices = tuple(int(getattr(d, "slice_index", None) or 0) for d in devices)
    return Layout(axes, slices, tuple(tuple(d.coords) for d in devices))
