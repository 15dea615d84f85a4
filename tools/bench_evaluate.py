"""What `python -m tools.bench --what=evaluate` measures: what scoring documents keeps of the forward pass's rate."""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launch.overrides import make_config
from tools.bench_where import here

QUICKSTART = "configs/quickstart.py"


def rows(args: Any) -> Iterator[dict[str, Any]]:
    """Yield tokens a second of the task `documents`, from the files to the result, and of the bare forward pass.

    The forward pass is the same model with the same loss, jitted, on full batches that lie on the device; both in turn
    on as many tokens, --tokens bytes of the config's training text or a little more.
    """
    config = make_config(args.config or QUICKSTART, args.override)
    device = here(args.backend, args.memory)
    from aether.data.sources import documents as read

    with tempfile.TemporaryDirectory() as folder:
        left = args.tokens
        for i, (_, text) in enumerate(read(config.data.path, config.data)):
            (Path(folder) / f"{i:06d}.txt").write_bytes(text)
            left -= len(text)
            if left <= 0:
                break
        evaluate, forward = contenders(config, folder, device.mesh)
        evaluate(), forward()
        pairs = [(evaluate(), forward()) for _ in range(args.rounds)]
    ratios = [a / b for a, b in pairs]
    yield dict(
        what=f"tokens a second of --task=documents / of the forward pass, {args.config or QUICKSTART}",
        ratio=statistics.median(ratios),
        documents=statistics.median(a for a, _ in pairs),
        forward=statistics.median(b for _, b in pairs),
        all=ratios,
    )


def contenders(config: Any, folder: str, mesh: Any) -> tuple[Callable[[], float], Callable[[], float]]:
    """Return two calls -> tokens a second: the task on the documents of a folder, and the forward pass on as many."""
    import jax
    import numpy as np
    from flax import nnx

    from aether.data.corpus import load_validation
    from aether.data.tokenizers import load_tokenizer
    from aether.evaluate.likelihood import Scorer
    from aether.evaluate.load import Run
    from aether.evaluate.tasks.task import Options
    from aether.evaluate.tasks.texts import documents
    from aether.losses import cross_entropy
    from aether.models import make_model
    from aether.parallel import shardings, to_global

    tokenizer = load_tokenizer(config.data.tokenizer)
    config = config.resolved(tokenizer.vocab_size)

    def make() -> Any:
        return nnx.state(make_model(config, nnx.Rngs(0)))

    graph = nnx.graphdef(nnx.eval_shape(lambda: make_model(config, nnx.Rngs(0))))
    params = jax.jit(make, out_shardings=shardings(jax.eval_shape(make), mesh, config.mesh))()
    scorer = Scorer(Run("", 0, config, graph, params, tokenizer, None, mesh))
    options = Options(config.data, None)

    def evaluate() -> float:
        begin = time.perf_counter()
        task = documents(folder, tokenizer, options)
        task.summarise(scorer(task.requests))
        return task.counts["tokens"] / (time.perf_counter() - begin)

    windows = load_validation(folder, config.data, tokenizer)
    size = scorer.ways * max(1, scorer.tokens // config.data.context // scorer.ways)
    full = [np.stack([windows[(k + row) % len(windows)]["tokens"] for row in range(size)]) for k in range(4)]
    ready = [to_global(dict(tokens=tokens), mesh) for tokens in full]
    count = -(-windows.tokens // (size * config.data.context))

    @jax.jit
    def loss(params: Any, batch: dict[str, jax.Array]) -> Any:
        model: Any = nnx.merge(graph, params)
        inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        hidden, _ = model(inputs)
        kernel = model.head_kernel().astype(hidden.dtype)
        ones = jax.numpy.ones(targets.shape, "float32")
        return cross_entropy(config.train.loss_chunk, 0.0, model.vocab, hidden, kernel, targets, ones)

    def forward() -> float:
        begin = time.perf_counter()
        with jax.set_mesh(mesh):
            out = [loss(params, batch) for batch in itertools.islice(itertools.cycle(ready), count)]
        jax.block_until_ready(out)
        return count * size * config.data.context / (time.perf_counter() - begin)

    return evaluate, forward
