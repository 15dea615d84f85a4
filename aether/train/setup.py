"""Everything before the first step: what the workdir says, the data, the state, the compiled step."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from aether import parallel
from aether.checkpoint import Checkpoints
from aether.config import CheckpointConfig, Config, build, differences
from aether.data.loader import Corpus, load_corpus
from aether.data.tokenizers import restore_tokenizer, save_tokenizer
from aether.errors import InputError
from aether.evaluate.metrics import bound_loss
from aether.losses import LOSSES, Loss
from aether.models import MODELS
from aether.train.report import METRICS, Metrics, check_wandb, finished
from aether.train.step import TrainState, init_state, make_step
from aether.workdir import Workdir

PACKAGES = ("aether", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Phases:
    """The phases of the start-up with their times, told as they end."""

    def __init__(self, started: float):
        self.started = started
        self.seconds: dict[str, float] = {}
        self._add("imports", time.perf_counter() - started)

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = seconds
        say(f"{name:>8} {seconds:6.2f} s")

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a phase."""
        begin = time.perf_counter()
        yield
        self._add(name, time.perf_counter() - begin)


def say(text: str) -> None:
    """Print a line to stderr, on process 0 only."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


@dataclass
class Run:
    """What the loop needs."""

    config: Config
    workdir: Workdir
    corpus: Corpus
    mesh: Mesh
    graph: nnx.GraphDef
    loss: Loss
    checkpoints: Checkpoints
    state: TrainState
    start: int
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
    phases: Phases = field(repr=False)


def start(config: Config, path: str, started: float) -> Run | None:
    """Open or continue the run in the folder `path`; None if it has made all its steps already.

    Raises:
      InputError: the workdir holds a run that this config cannot continue, or the config does not fit data or devices.
    """
    phases = Phases(started)
    check_wandb(config.train.wandb)
    workdir = Workdir(path, primary=jax.process_index() == 0)
    saved = _saved(workdir)
    with phases("data"):
        config, corpus = _open_data(config, saved, path)
    record = _record(config, corpus, saved)
    checkpoints = Checkpoints(workdir.checkpoints, config.checkpoint, log=say)
    if saved and _is_finished(config, checkpoints.latest(), workdir, list(corpus.validation)):
        say(f"{finished(workdir)}; nothing is left to do (a larger train.steps goes on).")
        return None
    mesh = parallel.make_mesh(config.mesh)
    parallel.check_batch(config.data.batch_size, config.train.accumulate, mesh)
    loss = bound_loss(LOSSES["lm"], config.train.loss_chunk, config.train.z_loss)

    with phases("init"):
        graph, make, like = describe_state(config, mesh)
        resumed = checkpoints.latest() is not None
        state = None if resumed else _first_state(config, make, mesh, like, corpus)
    with phases("compile"):
        step = compile_step(config, graph, loss, like, mesh)
    first = 0
    if resumed:
        with phases("restore"):
            state, meta, first = checkpoints.restore(like)
        say(f"going on from step {first} of {config.train.steps} in {workdir.path}")
    workdir.write_json("config.json", record)
    if workdir.primary:
        save_tokenizer(corpus.tokenizer, str(workdir.file("tokenizer")))
    workdir.sync()
    assert state is not None
    return Run(config, workdir, corpus, mesh, graph, loss, checkpoints, state, first, step, phases)


def _saved(workdir: Workdir) -> dict[str, Any] | None:
    """Return what config.json says of the run in the workdir, or None if there is none."""
    if not workdir.exists():
        if Checkpoints(workdir.checkpoints, CheckpointConfig()).steps():
            raise InputError(
                f"{workdir.path} has checkpoints but no config.json; put it back, or give another --workdir."
            )
        return None
    saved = workdir.read_json("config.json")
    if not (isinstance(saved, dict) and {"config", "data_fingerprint", "changes"} <= set(saved)):
        raise InputError(f"{workdir.path}/config.json is not the record of a run; give another --workdir.")
    return saved


def _open_data(config: Config, saved: dict[str, Any] | None, path: str) -> tuple[Config, Corpus]:
    """Return the resolved config, checked against the run that the workdir holds, and the texts."""
    if saved:
        old = build(saved["config"])
        config = config.continued(old)
        for key, was, now, free in differences(old, config):
            if not free:
                raise InputError(
                    f"The run in {path} has {key}={was!r}, but this config says {now!r}; "
                    "set it back to go on, or give another --workdir."
                )
    corpus = load_corpus(config.data, log=lambda line: say(f"  {line}"))
    if saved and saved["data_fingerprint"] != corpus.fingerprint:
        raise InputError(
            f"The texts of data.path have changed since the run in {path} began (fingerprint "
            f"{saved['data_fingerprint'][:8]} then, {corpus.fingerprint[:8]} now); "
            "restore them, or give another --workdir."
        )
    return config.resolved(corpus.tokenizer.vocab_size), corpus


def _is_finished(config: Config, latest: int | None, workdir: Workdir, validation: list[str]) -> bool:
    """Return whether all steps are made and the last evaluation is written down."""
    if latest is None or latest < config.train.steps:
        return False
    if latest > config.train.steps:
        raise InputError(
            f"The run in {workdir.path} has made {latest} steps and train.steps is {config.train.steps}; "
            f"set it above {latest} to go on, or give another --workdir."
        )
    metrics = Metrics(workdir.file(METRICS))
    return all(metrics.has(latest, name) for name in validation)


def _record(config: Config, corpus: Corpus, saved: dict[str, Any] | None) -> dict[str, Any]:
    """Return what config.json holds; changes that a continued run may make are added to its list."""
    changes = list(saved["changes"]) if saved else []
    if saved:
        made = differences(build(saved["config"]), config)
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        changes += [{"time": now, "key": key, "from": was, "to": to} for key, was, to, _ in made]
    return {
        "config": config.to_json(),
        "data_fingerprint": corpus.fingerprint,
        "versions": {name: _version(name) for name in PACKAGES} | {"python": sys.version.split()[0]},
        "git": _git_revision(),
        "changes": changes,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Return the revision of the code, with `-dirty` if it is changed; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def describe_state(config: Config, mesh: Mesh) -> tuple[nnx.GraphDef, Callable[[], TrainState], Any]:
    """Return the model's graph, the function that makes the first state, and that state's shapes with shardings."""
    c = config.model

    def model() -> nnx.Module:
        return MODELS[c.kind](c, config.data.context, nnx.Rngs(config.train.seed))

    graph, _ = nnx.split(nnx.eval_shape(model))

    def make() -> TrainState:
        return init_state(config, nnx.state(model()))

    shapes = jax.eval_shape(make)
    return graph, make, parallel.placed(shapes, mesh)


def _first_state(config: Config, make: Callable[[], TrainState], mesh: Mesh, like: Any, corpus: Corpus) -> TrainState:
    state: TrainState = jax.jit(make, out_shardings=parallel.shardings(like, mesh))()
    if not config.train.init_from:
        return state
    folder, at = _source(config.train.init_from)
    source = Workdir(folder, primary=False)
    if not source.exists():
        raise InputError(f"train.init_from is {config.train.init_from!r}, but {folder} holds no run (no config.json).")
    other = source.read_json("config.json")
    theirs = restore_tokenizer(str(source.local / "tokenizer"))
    if theirs.hash != corpus.tokenizer.hash:
        raise InputError(
            f"train.init_from names a run with the tokenizer {theirs.spec} ({theirs.vocab_size} ids, "
            f"{theirs.hash[:8]}), and this one has {corpus.tokenizer.spec} ({corpus.tokenizer.vocab_size} ids, "
            f"{corpus.tokenizer.hash[:8]}); set data.tokenizer to the same one."
        )
    part = "ema" if other["config"]["train"]["ema"] else "params"
    saved = Checkpoints(source.checkpoints, config.checkpoint, log=say)
    state.params, _, step = saved.restore_params(like.params, at, part=part)
    if config.train.ema:
        state.ema = jax.tree.map(lambda p: p.copy(), state.params)
    say(f"starting from the parameters of {folder} at step {step}")
    return state


def _source(text: str) -> tuple[str, int | None]:
    """Split DIR@STEP; DIR may have an @ of its own."""
    folder, _, at = text.rpartition("@")
    if not folder or "/" in at:
        return text, None
    if not at.isdecimal():
        raise InputError(f"train.init_from is {text!r}; what follows the @ is a step, a whole number.")
    return folder, int(at)


def compile_step(config: Config, graph: nnx.GraphDef, loss: Loss, like: Any, mesh: Mesh) -> Any:
    """Compile the training step for the shapes of the run, the state donated."""
    step = jax.jit(
        make_step(config, graph, loss, like.params),
        donate_argnums=0,
        out_shardings=(parallel.shardings(like, mesh), None),
    )
    return step.lower(like, batch_shapes(config, mesh)).compile()


def batch_shapes(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a global batch."""
    b, t = config.data.batch_size, config.data.context
    sharding = NamedSharding(mesh, parallel.BATCH)
    widths = dict(tokens=t + 1, segments=t + 1, positions=t + 1, mask=t)
    return {k: jax.ShapeDtypeStruct((b, w), np.int32, sharding=sharding) for k, w in widths.items()}
