"""The first part of an export: its files, the inputs for the comparison, and Aether's logits of them."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from aether.config import Config
from aether.data.corpus import TOKENIZER
from aether.data.tokenizers import save_tokenizer
from aether.errors import InputError
from aether.evaluate.load import Run, load_run
from aether.evaluate.run import validation_examples
from aether.export.bundle import facts_of, parameters_of
from aether.export.card import record_of
from aether.export.source import CONFIG, DTYPES, Asked, Source, Target, save_batches
from aether.models import describe_model
from aether.parallel import to_global

INPUTS = 64
POSITIONS = 64  # of each sequence; one more has the whole context
ROWS = 8  # compared at a time


def write(asked: Asked, to: Target, made: Path, work: Path, log: Callable[[str], None]) -> None:
    """Write the export into `made`, and into `work` what it is to be compared on, with what Aether makes of that."""
    run = load_run(asked.workdir, asked.step, average=asked.average)
    batches = _inputs(run, asked.data)
    log(f"writing step {run.step} of {run.workdir}")
    parameters = parameters_of(run.config, run.params, asked.dtype)
    record = record_of(run, asked.dtype, sum(p.size for p in parameters.values()), asked.licence)
    source = Source(facts_of(run.config), parameters, asked.dtype, run.tokenizer, run.labels, record)
    write_files(source, to, made)
    log(f"Aether on {sum(len(b) for b in batches)} inputs")
    save_batches(work, to.ours(source, batches) if to.ours else _logits(run, asked.dtype, batches))


def write_files(source: Source, to: Target, folder: Path) -> None:
    """Write config.json, classes.json and what the target adds."""
    config = dict(network=source.facts, aether=source.record)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if source.labels is not None:
        source.labels.save(str(folder))
    if source.tokenizer is not None:
        save_tokenizer(source.tokenizer, str(folder / TOKENIZER))
    to.write(source, folder)


def network(config: Config, model: Callable, x: jax.Array) -> jax.Array:
    """Return the float32 logits of ids or images, whatever the family."""
    if config.model.task == "classify":
        return model(x)
    hidden = model(x)
    return model.logits(hidden[0] if config.model.task == "lm" else hidden)  # type: ignore[attr-defined]


def _logits(run: Run, dtype: str, batches: list[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield each batch and its float32 logits, the network's parameters rounded to `dtype`."""
    plain: dict[str, Any] = dict(dtype="float32", attention_impl="auto")  # flash may have no kernel for CPUs
    config = dataclasses.replace(run.config, model=dataclasses.replace(run.config.model, **plain))
    graph, *_ = describe_model(config)

    @jax.jit
    def logits(variables: nnx.State, x: jax.Array) -> jax.Array:
        rounded = jax.tree.map(lambda a: a.astype(DTYPES[dtype]).astype(jnp.float32), variables)
        return network(config, nnx.merge(graph, rounded), x)

    ways = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    for batch in batches:
        rows = np.pad(batch, ((0, -len(batch) % ways), *((0, 0) for _ in batch.shape[1:])))
        with jax.set_mesh(run.mesh), jax.default_matmul_precision("highest"):
            yield batch, np.asarray(logits(run.params, to_global({"x": rows}, run.mesh)["x"]))[: len(batch)]


def _inputs(run: Run, data: str | None) -> list[np.ndarray]:
    """Return real inputs of the run's validation data, in batches: `INPUTS` rows of ids, or as many images at most."""
    name, examples = validation_examples(run, data)
    if len(examples) < 1:
        raise InputError(f"{name} has nothing to compare the export on; name other data by --data.")
    picked = [examples[k] for k in range(min(INPUTS, len(examples)))]
    if run.labels is not None:
        image = run.config.image
        pixels = np.stack([e["images"] for e in picked]).astype(np.float32)
        return _batches((pixels / 255 - np.float32(image.mean)) / np.float32(image.std))
    tokens = np.stack([e["tokens"] for e in picked])[:, : run.config.data.context].astype(np.int32)
    length = min(POSITIONS, tokens.shape[1])
    starts = [int(s) for s in np.linspace(0, tokens.shape[1] - length, -(-INPUTS // len(tokens)))]  # few are cut often
    rows = np.concatenate([tokens[:, s : s + length] for s in starts])[:INPUTS]
    return _batches(rows) + ([] if tokens.shape[1] <= POSITIONS else [tokens[:1]])


def _batches(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[k : k + ROWS] for k in range(0, len(rows), ROWS)]
