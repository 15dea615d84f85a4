"""Make a run of an export: the way back."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from aether.checkpoint import Checkpoints
from aether.config import Config, build, dumps
from aether.data.corpus import TOKENIZER
from aether.data.images.load import CLASSES
from aether.data.tokenizers import load_tokenizer, save_tokenizer
from aether.errors import InputError
from aether.evaluate.load import mesh_of
from aether.export import gpt2
from aether.export.bundle import state_of
from aether.export.source import CONFIG, FORMAT
from aether.export.targets import parameters_in
from aether.models import describe_model
from aether.parallel import shardings
from aether.storage import filled, new_folder
from aether.train.setup import describe_state
from aether.train.step import TrainState, init_state
from aether.workdir import CHECKPOINTS


def load_export(folder: str, workdir: str, *, tokenizer: str = "", log: Callable[[str], None] = print) -> int:
    """Make a run folder of an export, with a checkpoint at the step that was exported; return that step.

    `launch.evaluate`, `launch.generate` and `launch.export` take it as any other. `launch.train` goes on with it by the
    config that the run had, with the optimizer's moments at zero; another run starts from its parameters by
    `train.init_from`.

    Args:
      folder: an export to npz, torch, hf or gpt2, or transformers' folder of any GPT2LMHeadModel.
      workdir: a local folder that is not there yet, or is empty.
      tokenizer: of a GPT-2 that Aether has not exported, as `data.tokenizer` takes it; such a run has no data of its
        own, so that training starts from it by `train.init_from`.
      log: takes a line about what is going on.

    Raises:
      InputError: `folder` holds no export, or one whose parameters are not those of its network, or `workdir` has
        something in it.
      StorageError: `workdir` cannot be written.
    """
    folder, target = os.path.expanduser(folder), new_folder(workdir, "workdir")
    record = _record(Path(folder), tokenizer)
    try:
        config = build(record["config"])
    except (InputError, KeyError, TypeError) as e:
        raise InputError(f"{folder}/{CONFIG} does not describe a run that this Aether can build: {e}") from e
    state = _state(config, parameters_in(Path(folder)), record["step"])
    with filled(target) as made:
        _copy(Path(folder), made, config, tokenizer)
        known = {k: record.get(k) for k in ("data_fingerprint", "versions", "git")}
        (made / CONFIG).write_text(dumps(dict(config=record["config"], changes=[], **known)), encoding="utf-8")
        checkpoints = Checkpoints(str(made / CHECKPOINTS), config.checkpoint, log=log)
        checkpoints.save(record["step"], state, meta={})
        checkpoints.close()
    log(f"step {record['step']} of {folder} is in {workdir}")
    return record["step"]


def _record(folder: Path, tokenizer: str) -> dict[str, Any]:
    """Return what config.json says of the run."""
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if gpt2.is_gpt2(folder) and "aether" not in content:
            return _foreign(folder, content, tokenizer)
        made, record = content["network"]["format"], content["aether"]
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as e:
        why = f"{CONFIG} there says nothing of a network" if (folder / CONFIG).exists() else f"it has no {CONFIG}"
        raise InputError(f"--export is {folder}, which is no export of Aether's: {why}.") from e
    if made > FORMAT:
        raise InputError(f"{folder} is of format {made}, and this Aether reads up to {FORMAT}; take a newer Aether.")
    return record


def _foreign(folder: Path, content: dict[str, Any], tokenizer: str) -> dict[str, Any]:
    """Return the record of a GPT-2 that Aether has not exported."""
    if not tokenizer:
        raise InputError(f"{folder} is a GPT-2 that Aether has not made; give its --tokenizer, such as gpt2:FOLDER.")
    facts, _ = gpt2.parameters_from_gpt2(folder)
    model = {key: facts[key] for key in ("kind", "layers", "heads", "width", "hidden", "vocab")}
    half = "bfloat16" in (content.get("dtype"), content.get("torch_dtype"))
    model["dtype"] = "bfloat16" if half else "float32"
    data = dict(path="", context=facts["context"], tokenizer=tokenizer)
    config = build(dict(model=model, data=data)).resolved(load_tokenizer(tokenizer).vocab_size)
    return dict(config=config.to_json(), step=0, data_fingerprint="")


def _state(config: Config, parameters: Mapping[str, np.ndarray], step: int) -> TrainState:
    """Return the state of training with these parameters, spread over the devices here."""
    _, *shapes = describe_model(config)
    params, extras = nnx.split_state(state_of(config, nnx.merge_state(*shapes), parameters), nnx.Param, ...)
    mesh = mesh_of(config.mesh)
    _, _, like = describe_state(config, mesh)

    def make(params: nnx.State, extras: nnx.State) -> TrainState:
        return dataclasses.replace(init_state(config, params, extras), step=jax.numpy.int32(step))

    return jax.jit(make, out_shardings=shardings(like, mesh, config.mesh))(params, extras)


def _copy(folder: Path, made: Path, config: Config, tokenizer: str) -> None:
    """Copy what a run must know of its data."""
    if config.model.task == "classify":
        shutil.copy(folder / CLASSES, made / CLASSES)
    elif tokenizer:
        save_tokenizer(load_tokenizer(tokenizer), str(made / TOKENIZER))
    else:
        shutil.copytree(folder / TOKENIZER, made / TOKENIZER)
