"""The whole training step of `python -m tools.bench --what=step`: GPT-2 and AetherGPT, the state donated, by size."""

from collections.abc import Callable, Iterator
from typing import Any

from aether.config import Config
from launch.overrides import make_config
from tools.bench_compare import Contender, Program, Row, saved_bytes
from tools.bench_where import Where

KINDS = {"gpt2": "GPT-2", "aether": "AetherGPT"}
CONFIGS = {"tiny": "configs/quickstart.py"}  # of other sizes: configs/aether_124m.py


def tables(args: Any, where: Where) -> Iterator[tuple[str, list[Contender]]]:
    """Yield a table for each size; --config and its overrides hold for both models."""
    for size in args.sizes or (["tiny"] if where.on_cpu else ["124m"]):
        configs = {kind: config_of(kind, size, args) for kind in KINDS}
        data, dtype = configs["gpt2"].data, configs["gpt2"].model.dtype
        title = f"step: {size}, batch {data.batch_size} x {data.context}, {dtype}"
        yield title, [Contender(KINDS[kind], stepper(config)) for kind, config in configs.items()]


def config_of(kind: str, size: str, args: Any) -> Config:
    """Return the resolved config of a model: the file's, with this size and batch, without microbatches."""
    from aether.plan.measure import resolved

    path = args.config or CONFIGS.get(size, "configs/aether_124m.py")
    own = [f"model.kind={kind}", f"model.size={size}", f"data.batch_size={args.batch or 8}", "train.accumulate=1"]
    own += [f"data.context={args.context}"] if args.context else []
    config = make_config(path, [*own, *args.override])
    return resolved(config)


def stepper(config: Config) -> Callable[[Where], Program]:
    """Return how the step is compiled."""
    return lambda where: compiled(config, where.mesh)


def compiled(config: Config, mesh: Any) -> Program:
    """Compile the trainer's own step for a mesh; `saved` is what its loss keeps for the backward pass."""
    import jax
    from flax import nnx

    from aether import parallel
    from aether.losses import loss_of
    from aether.train.flops import flops_per_step, peak_flops
    from aether.train.setup import batch_shapes, compile_step, describe_state

    loss = loss_of(config)
    graph, make, like = describe_state(config, mesh)
    program = compile_step(config, graph, loss, like, mesh)

    def total(params: Any, batch: Any) -> Any:
        return loss(nnx.merge(graph, params), batch, None)[0]

    with jax.set_mesh(mesh):
        shapes = like.params, batch_shapes(config, mesh)
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
    """Return a batch of uniform ids, one document a row, on the mesh."""
    import numpy as np

    from aether import parallel

    b, t = config.data.batch_size, config.data.context
    ids = np.random.default_rng(0).integers(0, config.model.vocab, (b, t + 1), dtype=np.int32)
    places = np.broadcast_to(np.arange(t + 1, dtype=np.int32), ids.shape)
    batch = dict(tokens=ids, segments=np.ones_like(ids), positions=places, mask=np.ones((b, t), np.int32))
    return parallel.to_global(batch, mesh)
