"""What `python -m tools.bench` measures of the stack itself: the loop, the start, the reader and decoding."""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import flags

from launch.overrides import make_config

QUICKSTART = "configs/quickstart.py"


def loop(args: flags.FlagValues) -> dict[str, Any]:
    """Return what the loop adds to the bare step, from runs of the real loop in which each call is timed apart.

    A step within the loop lasts from one call of the compiled step to the next, the bare one from the call until its
    results are there: pairs on the same batch in the same moment, which other work on the machine slows alike.
    """
    import jax

    from aether.train import loop as module

    short = dict(steps=args.steps, eval_every=0, eval_batches=1, sample_tokens=0)
    config = make_config(QUICKSTART, [f"train.{key}={value}" for key, value in short.items()])
    start = module.start
    calls: list[tuple[float, float]] = []

    def timed_start(*words: Any) -> Any:
        run = start(*words)
        assert run is not None
        step = run.step

        def timed(state: Any, batch: Any) -> Any:
            begin = time.perf_counter()
            result = jax.block_until_ready(step(state, batch))
            calls.append((begin, time.perf_counter() - begin))
            return result

        run.step = timed
        return run

    within, bare, waits = [], [], []
    module.start = timed_start
    try:
        for _ in range(args.rounds):
            calls.clear()
            with tempfile.TemporaryDirectory() as folder:
                module.train(config, folder)
                lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
            waits += [line["data_wait"] for line in lines if line["split"] == "train"][10:]
            pairs = zip(calls[10:], calls[11:], strict=False)
            for (begin, seconds), (following, _) in pairs:
                within.append(following - begin)
                bare.append(seconds)
    finally:
        module.start = start
    return dict(
        what="a step within the loop / the bare jitted step, median of pairs",
        ratio=statistics.median(a / b for a, b in zip(within, bare, strict=True)),
        loop_ms=1e3 * statistics.median(within),
        bare_ms=1e3 * statistics.median(bare),
        data_wait_share=statistics.mean(waits),
        pairs=len(bare),
    )


def startup(args: flags.FlagValues) -> dict[str, Any]:
    """Return the seconds from the command to the first step of the quickstart: no cache at all, then a warm one."""
    cold, warm = [], []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(first_step(cache))
            warm.append(first_step(cache))
    return dict(
        what="seconds from the command to the first step", cold=statistics.median(cold), warm=statistics.median(warm),
        all_cold=cold, all_warm=warm,
    )  # fmt: skip


def first_step(cache: str) -> float:
    """Start the quickstart with this cache and return the seconds until its first step is reported."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {"AETHER_CACHE": cache}
    command = [sys.executable, "-m", "launch.train", f"--config={QUICKSTART}", "--config.train.sample_tokens=0"]
    with tempfile.TemporaryDirectory() as workdir:
        begin = time.perf_counter()
        run = subprocess.Popen(
            [*command, f"--workdir={workdir}"], stderr=subprocess.PIPE, text=True, env=environment
        )  # fmt: skip
        assert run.stderr is not None
        try:
            for line in run.stderr:
                if re.match(r"step 1/", line):
                    return time.perf_counter() - begin
            raise RuntimeError("the quickstart ended before its first step")
        finally:
            run.kill()
            run.wait()


def reader(args: flags.FlagValues) -> dict[str, Any]:
    """Return the tokens a second that one thread reads, windows of 1024 tokens in shuffled order."""
    import numpy as np

    from aether.config import DataConfig
    from aether.data.corpus import load_corpus

    config = DataConfig(context=1024, batch_size=8)
    windows = load_corpus(config).train[0].examples
    order = np.random.default_rng(0).permutation(len(windows))
    rates = []
    for _ in range(args.rounds):
        begin = time.perf_counter()
        for i in order:
            windows[int(i)]
        rates.append(len(order) * 1024 / (time.perf_counter() - begin))
    return dict(what="tokens a second of the reader at 1024 a sequence", median=statistics.median(rates), all=rates)


def decode(args: flags.FlagValues) -> dict[str, Any]:
    """Return the time of 512 new tokens with the cache, and by a full forward pass over 512 positions for each."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from aether.config import build
    from aether.generate.decode import Decoder
    from aether.models.gpt import GPT

    length = 512
    c = build({"model": {"dtype": "float32"}}).model.resolved(257)
    graph, params = nnx.split(GPT(c, length, nnx.Rngs(0)))
    decoder = Decoder(graph, length, 256, 256)  # end of text is beyond what is drawn, so that no sample ends early

    @jax.jit
    def full(params: Any, ids: jax.Array, last: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params)
        hidden, _ = model(ids)
        return jnp.argmax(model.logits(hidden[:, last][:, None])[0, -1, :256])

    def cached() -> int:
        return sum(1 for _ in decoder.stream(params, np.zeros(0, np.int32), length - 1, temperature=0.0))

    def recomputed(count: int) -> None:
        ids = np.full((1, length), 256, np.int32)
        for i in range(count):
            ids[0, i + 1] = int(full(params, ids, i))

    cached(), recomputed(2)
    few = 64
    with_cache, without = [], []
    for _ in range(args.rounds):
        begin = time.perf_counter()
        made = cached()
        with_cache.append((time.perf_counter() - begin) / made)
        begin = time.perf_counter()
        recomputed(few)
        without.append((time.perf_counter() - begin) / few)
    ratios = [b / a for a, b in zip(with_cache, without, strict=True)]
    return dict(
        what=f"a full pass over {length} positions a token / a token with the cache",
        ratio=statistics.median(ratios),
        ratios=ratios,
        cached_ms=1e3 * statistics.median(with_cache),
        recomputed_ms=1e3 * statistics.median(without),
    )
