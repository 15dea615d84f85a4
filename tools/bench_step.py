"""The whole training step of `python -m tools.bench --what=step`, the state donated: a network and its baseline."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from aether.config import Config
from aether.config.kinds import BASELINES
from launch.overrides import make_config
from tools.bench_compare import Contender, Program, Row, saved_bytes
from tools.bench_where import Where

NAMES = dict(
    **dict(gpt2="GPT-2", aether="AetherGPT", bert="BERT", minibert="MiniBERT"),
    **dict(resnet="ResNet", aether_resnet="AetherResNet", vit="ViT", aether_vit="Aether-ViT"),
)
CONFIGS = {"tiny": "configs/quickstart.py"}  # of other sizes: configs/aether_124m.py


def tables(args: Any, where: Where) -> Iterator[tuple[str, list[Contender]]]:
    """Yield the table of --config, or without it and with --sizes one of GPT for each size; overrides hold for all."""
    sizes = args.sizes or ([] if args.config else ["tiny"] if where.on_cpu else ["124m"])
    for size in sizes or [""]:
        configs = pair(size, args)
        first = next(iter(configs.values()))
        what = size or Path(args.config).stem
        title = f"step: {what}, batch {shape_of(first)}, {first.model.dtype}"
        yield title, [Contender(NAMES[kind], stepper(config)) for kind, config in configs.items()]


def pair(size: str, args: Any) -> dict[str, Config]:
    """Return the resolved configs of a file's baseline and of the ⵟ network, without microbatches; a size for GPT's."""
    path = args.config or CONFIGS.get(size, "configs/aether_124m.py")
    own = ["train.accumulate=1"] + ([f"model.size={size}", "data.batch_size=8"] if size else [])
    own += [f"data.batch_size={args.batch}"] if args.batch else []
    own += [f"data.context={args.context}"] if args.context else []
    return both(path, [*own, *args.override])


def both(path: str, overrides: list[str]) -> dict[str, Config]:
    """Return the resolved configs of a baseline and its ⵟ network, by kind; the file's is one of the two."""
    from aether.plan.measure import resolved

    kind = make_config(path, overrides).model.kind
    ours, usual = next(two for two in BASELINES.items() if kind in two)
    return {k: resolved(make_config(path, [*overrides, f"model.kind={k}"])) for k in (usual, ours)}


def shape_of(config: Config) -> str:
    """Return what a batch holds: sequences and tokens, or images with their sides and channels."""
    image = config.image
    row = (config.data.context,) if config.unit == "tokens" else (image.size, image.size, image.channels)
    return " x ".join(map(str, (config.data.batch_size, *row)))


def stepper(config: Config) -> Callable[[Where], Program]:
    """Return how the step is compiled."""
    return lambda where: compiled(config, where.mesh)


def compiled(config: Config, mesh: Any) -> Program:
    """Compile the trainer's own step for a mesh; `saved` is what its loss in training keeps for the backward pass."""
    import jax
    from flax import nnx

    from aether import parallel
    from aether.losses import loss_of
    from aether.train.flops import flops_per_step, peak_flops
    from aether.train.setup import batch_shapes, compile_step, describe_state

    loss = loss_of(config)
    graph, make, like = describe_state(config, mesh)
    program = compile_step(config, graph, loss, like, mesh)

    def total(params: Any, extras: Any, batch: Any) -> Any:
        return loss(nnx.merge(graph, params, extras, copy=True), batch, jax.random.key(0))[0]

    with jax.set_mesh(mesh):
        shapes = like.params, like.extras, batch_shapes(config, mesh)
        saved, beside = (saved_bytes(total, *shapes, given=given) for given in (True, False))

    def start() -> Callable[[], Any]:
        state = jax.jit(make, out_shardings=parallel.shardings(like, mesh, config.mesh))()
        batch = random_batch(config, mesh)

        def call() -> Any:
            nonlocal state
            state, metrics = program(state, batch)
            return state, metrics

        return call

    def more(ms: float) -> Row:
        peak = peak_flops(list(mesh.devices.flat))
        mfu = flops_per_step(config) / (ms / 1e3) / peak if peak else None
        return {f"{config.unit}_per_second": config.per_step / ms * 1e3, "mfu": mfu}

    return Program(program, saved, beside, start, more)


def random_batch(config: Config, mesh: Any) -> Any:
    """Return a batch of uniform ids, pixels and labels on the mesh, one document a row, of which everything counts."""
    import numpy as np

    from aether import parallel
    from aether.train.setup import batch_shapes

    m, rng = config.model, np.random.default_rng(0)
    below = dict(tokens=m.vocab, targets=m.vocab, images=256, labels=m.classes)

    def array(name: str, s: Any) -> Any:
        if name in below:
            return rng.integers(0, below[name], s.shape, s.dtype)
        ones = np.ones(s.shape, s.dtype)
        return np.cumsum(ones, -1, s.dtype) - 1 if name == "positions" else ones

    return parallel.to_global({name: array(name, s) for name, s in batch_shapes(config, mesh).items()}, mesh)
