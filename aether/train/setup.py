"""Everything before the first step: what the workdir says, the data, the state, the compiled step."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
from aether.config import CheckpointConfig, Config, build_saved, differences
from aether.data.corpus import TOKENIZER, Corpus, open_corpus
from aether.data.images.load import Labels
from aether.data.tokenizers import Tokenizer, restore_tokenizer
from aether.errors import InputError
from aether.evaluate.metrics import Scores, scorer_of
from aether.generate.decode import Decoder
from aether.losses import Loss, loss_of
from aether.models import describe_model, make_model
from aether.train import agree
from aether.train.activity import Activity
from aether.train.guard import Guard
from aether.train.report import METRICS, Metrics, check_wandb, finished
from aether.train.spikes import LeftOut
from aether.train.step import STOP, TrainState, init_state, make_step
from aether.train.units import Units
from aether.workdir import Workdir

PACKAGES = ("aether", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Phases:
    """The phases of the start-up with their times, told as they end."""

    def __init__(self, started: float):
        self.started = started
        self.activity = Activity(started)
        self.seconds: dict[str, float] = {}
        self._add("imports", time.perf_counter() - started)

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = seconds
        say(f"{name:>9} {seconds:6.2f} s")

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a phase."""
        begin = time.perf_counter()
        with self.activity(name):
            yield
        self._add(name, time.perf_counter() - begin)


def say(text: str) -> None:
    """Print a line to stderr, on process 0 only."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


@dataclass
class Run:
    """What the loop needs.

    Attributes:
      like: the shapes and shardings of the state.
      state: donated with the first step.
      start: the updates made already.
      left_out: which batches are.
      step: the compiled (state, batch) -> (state, metrics).
      units: tells of the ⵟ units; None if `train.telemetry_every` is 0.
      score: see `aether.evaluate.metrics.scorer_of`.
      decoder: writes samples of a language model; None for other tasks.
      guard: watches this process.
    """

    config: Config
    workdir: Workdir
    corpus: Corpus
    mesh: Mesh
    checkpoints: Checkpoints
    like: Any = field(repr=False)
    state: TrainState = field(repr=False)
    start: int
    left_out: LeftOut
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
    units: Units | None
    score: Callable[..., Scores]
    decoder: Decoder | None
    guard: Guard


def start(config: Config, path: str, started: float, held: ExitStack) -> Run | None:
    """Open or continue the run in the folder `path`; None if it has made all its steps already.

    Args:
      config, path, started: see `aether.train.loop.train`.
      held: takes what is to be given back when the training ends, however it does: the folder.

    Raises:
      InputError: another process trains in the workdir, or it holds a run that this config cannot continue, or the
        config does not fit data or devices.
    """
    phases = Phases(started)
    check_wandb(config.train.wandb)
    workdir = Workdir(path, primary=jax.process_index() == 0)
    agree.of_first(lambda: held.enter_context(workdir.alone(say)))
    saved = agree.of_first(lambda: _saved(workdir))
    config = _continued(config, saved, path) if saved else config
    mesh = parallel.make_mesh(config.mesh)
    parallel.check(config.resolved(vocab=0), mesh)
    with phases("data"):
        corpus = _open_data(config, saved, path)
        config = corpus.resolved(config)
    checkpoints = Checkpoints(workdir.checkpoints, config.checkpoint, log=say)
    latest = agree.of_first(checkpoints.latest)
    if saved and agree.of_first(lambda: _is_finished(config, latest, workdir, checkpoints, list(corpus.validation))):
        say(f"{finished(workdir)}; nothing is left to do (a larger train.steps goes on).")
        return None
    loss = loss_of(config)

    with phases("init"):
        graph, make, like = describe_state(config, mesh)
        state = None if latest is not None else _first_state(config, make, mesh, like, corpus)
    guard = Guard(config, corpus, workdir, phases.activity)
    first = 0
    try:
        with phases("compile"):
            step = compile_step(config, graph, loss, like, mesh)
        units = None
        if config.train.telemetry_every:
            with phases("telemetry"):
                units = Units(config, graph, loss, like, batch_shapes(config, mesh), mesh)
        if latest is not None:
            with phases("restore"):
                state, _, first = checkpoints.restore(like)
            say(f"going on from step {first} of {config.train.steps} in {workdir.path}")
        if workdir.primary:
            workdir.write_json("config.json", _record(config, corpus, saved))
            corpus.save(workdir.local)
        workdir.sync()
        left_out = LeftOut.load(workdir)
        guard.begin(first)
    except BaseException:
        guard.close()
        raise
    assert state is not None
    return Run(
        config=config,
        workdir=workdir,
        corpus=corpus,
        mesh=mesh,
        checkpoints=checkpoints,
        like=like,
        state=state,
        start=first,
        left_out=left_out,
        step=step,
        units=units,
        score=scorer_of(config, corpus.tokenizer, graph, mesh),
        decoder=_decoder(config, corpus, graph, mesh),
        guard=guard,
    )


def _decoder(config: Config, corpus: Corpus, graph: nnx.GraphDef, mesh: Mesh) -> Decoder | None:
    """Return what writes samples of a language model."""
    if config.model.task != "lm" or corpus.tokenizer is None:
        return None
    eot, ids = corpus.tokenizer.eot, corpus.tokenizer.vocab_size
    return Decoder(graph, config.data.context, eot, ids, mesh if jax.process_count() > 1 else None)


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


def _continued(config: Config, saved: dict[str, Any], path: str) -> Config:
    """Return the config with what it leaves open taken from the run that the workdir holds, which it has to fit."""
    old = build_saved(saved["config"])
    config = config.continued(old)
    for key, was, now, free in differences(old, config):
        if not free:
            raise InputError(
                f"The run in {path} has {key}={was!r}, but this config says {now!r}; "
                "set it back to go on, or give another --workdir."
            )
    return config


def _open_data(config: Config, saved: dict[str, Any] | None, path: str) -> Corpus:
    """Return the data, checked against those of the run that the workdir holds."""
    corpus = open_corpus(config, log=lambda line: say(f"  {line}"))
    agree.check_equal("The fingerprint of data.path", corpus.fingerprint, "give all processes the same files")
    if saved and saved["data_fingerprint"] != corpus.fingerprint:
        raise InputError(
            f"The data of data.path have changed since the run in {path} began (fingerprint "
            f"{saved['data_fingerprint'][:8]} then, {corpus.fingerprint[:8]} now); "
            "restore them, or give another --workdir."
        )
    return corpus


def _is_finished(
    config: Config, latest: int | None, workdir: Workdir, checkpoints: Checkpoints, validation: list[str]
) -> bool:
    """Return whether all steps are made, their checkpoint is sound and the last evaluation is written down."""
    if latest is None or latest < config.train.steps:
        return False
    if latest > config.train.steps:
        raise InputError(
            f"The run in {workdir.path} has made {latest} steps and train.steps is {config.train.steps}; "
            f"set it above {latest} to go on, or give another --workdir."
        )
    metrics = Metrics(workdir.file(METRICS))
    return all(metrics.has(latest, name) for name in validation) and checkpoints.is_sound(latest)


def _record(config: Config, corpus: Corpus, saved: dict[str, Any] | None) -> dict[str, Any]:
    """Return what config.json holds; changes that a continued run may make are added to its list."""
    changes = list(saved["changes"]) if saved else []
    if saved:
        made = differences(build_saved(saved["config"]), config)
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        changes += [{"time": now, "key": key, "from": was, "to": to} for key, was, to, _ in made]
    return {
        "config": config.to_json(),
        "data_fingerprint": corpus.fingerprint,
        "versions": {name: _version(name) for name in PACKAGES} | {"python": sys.version.split()[0]},
        "git": git_revision(),
        "changes": changes,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_revision() -> str | None:
    """Return the revision of the code, with `-dirty` if it is changed; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def describe_state(config: Config, mesh: Mesh) -> tuple[nnx.GraphDef, Callable[[], TrainState], Any]:
    """Return the model's graph, the function that makes the first state, and that state's shapes with shardings."""
    graph, _, _ = describe_model(config)

    def make() -> TrainState:
        return init_state(config, *nnx.split(make_model(config, nnx.Rngs(config.train.seed)), nnx.Param, ...)[1:])

    shapes = jax.eval_shape(make)
    return graph, make, parallel.placed(shapes, mesh, config.mesh)


def _first_state(config: Config, make: Callable[[], TrainState], mesh: Mesh, like: Any, corpus: Corpus) -> TrainState:
    state: TrainState = jax.jit(make, out_shardings=parallel.shardings(like, mesh, config.mesh))()
    if not config.train.init_from:
        return state
    folder, at = _source(config.train.init_from)
    source = Workdir(folder, primary=False)
    other = agree.of_first(lambda: _other_run(config, source, folder))
    if corpus.tokenizer is not None:
        _check_same(restore_tokenizer(str(source.local / TOKENIZER)), corpus.tokenizer)
    if corpus.labels is not None:
        _check_classes(Labels.restore(str(source.local)), corpus.labels)
    saved = Checkpoints(source.checkpoints, config.checkpoint, log=say)
    both, step = saved.restore_model(like.params, like.extras, at, averaged=bool(other["config"]["train"]["ema"]))
    state.params, state.extras = nnx.split_state(both, nnx.Param, ...)
    if config.train.ema:
        state.ema = jax.tree.map(lambda p: p.copy(), both)
    say(f"starting from the parameters of {folder} at step {step}")
    return state


def _check_same(theirs: Tokenizer, ours: Tokenizer) -> None:
    if theirs.hash != ours.hash:
        raise InputError(
            f"train.init_from names a run with the tokenizer {theirs.spec} ({theirs.vocab_size} ids, "
            f"{theirs.hash[:8]}), and this one has {ours.spec} ({ours.vocab_size} ids, "
            f"{ours.hash[:8]}); set data.tokenizer to the same one."
        )


def _check_classes(theirs: Labels, ours: Labels) -> None:
    if theirs.names == ours.names:
        return
    had, has = f"{len(theirs.names)} classes", f"{len(ours.names)}"
    if len(theirs.names) == len(ours.names):
        number = next(n for n, names in enumerate(zip(theirs.names, ours.names, strict=True)) if len(set(names)) > 1)
        had, has = (f"{labels.names[number]!r} as class {number}" for labels in (theirs, ours))
    raise InputError(
        f"train.init_from names a run with {had}, and this one has {has}; give images of the same classes."
    )


def _other_run(config: Config, source: Workdir, folder: str) -> dict[str, Any]:
    if not source.exists():
        raise InputError(f"train.init_from is {config.train.init_from!r}, but {folder} holds no run (no config.json).")
    return source.read_json("config.json")


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
        out_shardings=(parallel.shardings(like, mesh, config.mesh), None),
    )
    with jax.set_mesh(mesh):
        return step.lower(like, batch_shapes(config, mesh)).compile()


def batch_shapes(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a global batch; where there are several processes, with what tells them to stop."""
    b, t, side = config.data.batch_size, config.data.context, config.image.size
    sharding = NamedSharding(mesh, parallel.BATCH)
    rows: dict[str, dict[str, tuple[int, ...]]] = dict(
        lm=dict(tokens=(t + 1,), segments=(t + 1,), positions=(t + 1,), mask=(t,)),
        mlm=dict.fromkeys(("tokens", "targets", "segments", "positions", "mask"), (t,)),
        classify=dict(images=(side, side, config.image.channels), labels=(), mask=()),
    )
    shapes = {
        k: jax.ShapeDtypeStruct((b, *row), np.uint8 if k == "images" else np.int32, sharding=sharding)
        for k, row in rows[config.model.task].items()
    }
    if jax.process_count() > 1:
        each = NamedSharding(mesh, parallel.P(mesh.axis_names))
        shapes[STOP] = jax.ShapeDtypeStruct((mesh.size,), np.int32, sharding=each)
    return shapes
