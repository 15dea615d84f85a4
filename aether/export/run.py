"""Export a run: files, their proof and their card, all in one folder or none of it."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
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
from aether.errors import CheckError, InputError
from aether.evaluate.load import Run, load_run
from aether.evaluate.run import validation_examples
from aether.export.bundle import DTYPES, facts_of, parameters_of
from aether.export.card import card_of, record_of
from aether.export.parity import Verdict
from aether.export.source import NOTES, Source, Target
from aether.export.targets import target_of
from aether.models import describe_model
from aether.parallel import to_global
from aether.storage import storage_errors

INPUTS = 64
POSITIONS = 64  # of each sequence; one more has the whole context
ROWS = 8  # compared at a time
CONFIG, PARITY, CARD, UNVERIFIED = "config.json", "parity.json", "README.md", "UNVERIFIED"


def export_run(
    workdir: str,
    target: str,
    out: str,
    *,
    step: int | None = None,
    average: str = "auto",
    dtype: str = "float32",
    data: str | None = None,
    licence: str = "unknown",
    log: Callable[[str], None] = print,
) -> Verdict:
    """Write a checkpoint for another framework, run it there, and compare it with Aether; return how near it is.

    The folder appears when all is done. Where the logits differ by more than `parity.BOUND`, it is left to be looked
    at, with a file UNVERIFIED in it.

    Args:
      workdir: of the run.
      target: a name in `aether.export.targets.TARGETS`.
      out: a folder that is not there yet, or is empty.
      step: of the checkpoint; the last by default.
      average: which parameters, see `aether.evaluate.load.load_run`.
      dtype: of what is written, float32 or bfloat16; both sides then compute in float32 with the rounded parameters.
      data: what they are compared on, as in `aether.evaluate.run.evaluate_run`.
      licence: for the card, as model hubs name it.
      log: takes a line about what is going on.

    Raises:
      InputError: no such run, target or data, a package is missing, or `out` has something in it.
      CheckError: the logits differ, or the export does not run.
      StorageError: `out` cannot be written.
    """
    to, folder = target_of(target), Path(os.path.abspath(os.path.expanduser(out)))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--out is {out}, which is there and not empty; give a new folder.")
    with storage_errors(out):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            work, made = Path(scratch) / "work", Path(scratch) / "export"
            work.mkdir()
            made.mkdir()
            facts, record = _write(load_run(workdir, step, average=average), to, made, work, dtype, data, licence, log)
            if to.finish is not None:
                _child("finish", to, target, made)
            log(f"{target} on the same")
            _child("replay", to, target, made, work)
            parity = to.compare(made, _pairs(work))
            (made / PARITY).write_text(json.dumps(parity.record(), indent=2) + "\n", encoding="utf-8")
            notes = (made / NOTES).read_text(encoding="utf-8") if (made / NOTES).exists() else ""
            (made / CARD).write_text(card_of(facts, record, to, target, parity, notes), encoding="utf-8")
            if not parity.holds:
                (made / UNVERIFIED).write_text(parity.verdict(target) + "\n", encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
    if not parity.holds:
        raise CheckError(f"{parity.verdict(target)} The files in {out} are marked {UNVERIFIED}.")
    return parity


def _write(
    run: Run, to: Target, made: Path, work: Path, dtype: str, data: str | None, licence: str, log: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the export, the inputs for the comparison, and Aether's logits; return the facts and the record."""
    batches = _inputs(run, data)
    log(f"writing step {run.step} of {run.workdir}")
    parameters = parameters_of(run.config, run.params, dtype)
    facts, record = facts_of(run.config), record_of(run, dtype, sum(p.size for p in parameters.values()), licence)
    source = Source(facts, parameters, dtype, run.tokenizer, run.labels, record)
    write_files(source, to, made)
    log(f"Aether on {sum(len(b) for b in batches)} inputs")
    pairs = to.ours(source, batches) if to.ours else _logits(run, dtype, batches)
    del source, parameters
    for k, (inputs, outputs) in enumerate(pairs):
        np.save(work / f"inputs-{k:03}.npy", inputs)
        np.save(work / f"ours-{k:03}.npy", outputs)
    return facts, record


def _logits(run: Run, dtype: str, batches: list[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    forward = _forward(run, dtype)
    return ((batch, forward(batch)) for batch in batches)


def write_files(source: Source, to: Target, folder: Path) -> None:
    """Write config.json, classes.json and what the target adds."""
    config = dict(network=source.facts, aether=source.record)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if source.labels is not None:
        source.labels.save(str(folder))
    if source.tokenizer is not None:
        save_tokenizer(source.tokenizer, str(folder / TOKENIZER))
    to.write(source, folder)


def _forward(run: Run, dtype: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return logits(inputs) of the network in float32, its parameters rounded to `dtype`."""
    config = dataclasses.replace(run.config, model=dataclasses.replace(run.config.model, dtype="float32"))
    graph, *_ = describe_model(config)

    @jax.jit
    def logits(variables: nnx.State, x: jax.Array) -> jax.Array:
        rounded = jax.tree.map(lambda a: a.astype(DTYPES[dtype]).astype(jnp.float32), variables)
        return network(config, nnx.merge(graph, rounded), x)

    ways = run.mesh.shape["data"] * run.mesh.shape["fsdp"]

    def forward(batch: np.ndarray) -> np.ndarray:
        rows = np.pad(batch, ((0, -len(batch) % ways), *((0, 0) for _ in batch.shape[1:])))
        with jax.set_mesh(run.mesh), jax.default_matmul_precision("highest"):
            return np.asarray(logits(run.params, to_global({"x": rows}, run.mesh)["x"]))[: len(batch)]

    return forward


def network(config: Config, model: Callable, x: jax.Array) -> jax.Array:
    """Return the float32 logits of ids or images, whatever the family."""
    if config.model.task == "classify":
        return model(x)
    hidden = model(x)
    return model.logits(hidden[0] if config.model.task == "lm" else hidden)  # type: ignore[attr-defined]


def _inputs(run: Run, data: str | None) -> list[np.ndarray]:
    """Return `INPUTS` real inputs of the run's validation data, in batches: ids, or normalised images."""
    name, examples = validation_examples(run, data)
    if len(examples) < 1:
        raise InputError(f"{name} has nothing to compare the export on; name other data by --data.")
    picked = [examples[k % len(examples)] for k in range(INPUTS)]
    if run.labels is not None:
        image = run.config.image
        pixels = np.stack([e["images"] for e in picked]).astype(np.float32)
        return _batches((pixels / 255 - np.float32(image.mean)) / np.float32(image.std))
    tokens = np.stack([e["tokens"] for e in picked])[:, : run.config.data.context].astype(np.int32)
    longest = [] if tokens.shape[1] <= POSITIONS else [tokens[:1]]
    return _batches(tokens[:, :POSITIONS]) + longest


def _batches(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[k : k + ROWS] for k in range(0, len(rows), ROWS)]


def _child(module: str, to: Target, target: str, *folders: Path) -> None:
    """Run a part of an export in a process that sees its files alone."""
    command = [sys.executable, "-m", f"aether.export.{module}", target, *map(str, folders)]
    done = subprocess.run(command, env=os.environ | to.environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise CheckError(f"The {target} export does not run: {last}")


def _pairs(work: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for file in sorted(work.glob("ours-*.npy")):
        theirs = np.load(file.with_name(file.name.replace("ours", "logits")), allow_pickle=False)
        yield np.load(file, allow_pickle=False), theirs
