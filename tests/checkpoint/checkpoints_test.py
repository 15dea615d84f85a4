"""Checkpoints: what is saved comes back bit by bit, whatever kills, fills or damages the disk in between."""

import dataclasses
import errno
import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from aether import storage
from aether.checkpoint import Checkpoints, tensors
from aether.checkpoint.home import MARKER
from aether.checkpoint.record import UPGRADES
from aether.config import CheckpointConfig
from aether.errors import InputError, StorageError


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    step: jax.Array
    params: nnx.State
    opt_state: optax.OptState


class Net(nnx.Module):
    def __init__(self, rngs):
        self.mlp = nnx.Linear(16, 8, rngs=rngs)
        self.head = nnx.Linear(8, 4, use_bias=False, rngs=rngs)


def make_state(seed=0):
    params = nnx.state(Net(nnx.Rngs(seed)), nnx.Param)
    return TrainState(jnp.int32(seed), params, optax.adamw(1e-3).init(params))


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes(), path


@pytest.fixture
def opened(tmp_path):
    """Return a function that opens the checkpoints in a folder; all are closed after the test."""
    made = []

    def open_(directory=tmp_path / "c", log=None, **policy):
        config = CheckpointConfig(**{"keep_last": 100, "keep_best": 0, **policy})
        made.append(Checkpoints(str(directory), config, **({"log": log} if log else {})))
        return made[-1]

    yield open_
    for c in made:
        c.close()


def filled(c, *steps, losses=()):
    for step, loss in zip(steps, losses or [None] * len(steps), strict=True):
        c.save(step, make_state(step), meta={"config": {"step": step}}, loss=loss)
    c.wait()
    return c


def arrays_file(folder):
    return max((p for p in folder.rglob("d/*")), key=lambda p: p.stat().st_size)


def truncate(folder):
    os.truncate(arrays_file(folder), 10)


def remove(folder):
    arrays_file(folder).unlink()


def flip(folder):
    data = bytearray(arrays_file(folder).read_bytes())
    data[len(data) // 2] ^= 1
    arrays_file(folder).write_bytes(data)


def no_meta(folder):
    (folder / "meta.json").unlink()


def no_arrays(folder):
    shutil.rmtree(folder / "state")


def run(script, **env):
    """Run a script in its own process, and show what it wrote if it fails."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Names and values


def test_a_train_state_comes_back_bit_by_bit(opened):
    state = make_state(3)
    c = opened()
    assert (c.steps(), c.latest(), c.best()) == ([], None, None)
    c.save(7, state, meta={"config": {"width": 8}, "note": "ⵟ"}, loss=2.5)
    restored, meta, step = c.restore(abstract(state))
    same(restored, state)
    assert isinstance(restored, TrainState) and isinstance(restored.params, nnx.State)
    assert (meta, step) == ({"config": {"width": 8}, "note": "ⵟ"}, 7)
    assert (c.steps(), c.latest(), c.best()) == ([7], 7, 7)


def test_every_kind_of_leaf_comes_back_as_it_was(opened):
    bits = jax.random.bits(jax.random.key(0), (64, 3), jnp.uint16)
    tree = {
        "bf16": jax.lax.bitcast_convert_type(bits, jnp.bfloat16),
        "f32": jnp.array([[-0.0, jnp.nan, jnp.inf, 1e-42]]),
        "i8": jnp.arange(-3, 3, dtype=jnp.int8),
        "bool": jnp.array([True, False]),
        "scalar": jnp.uint32(2**32 - 1),
        "numpy": np.arange(6, dtype=np.int64).reshape(2, 3),
        "int": 5,
        "float": 0.1,
    }
    c = opened()
    c.save(1, tree, meta={})
    restored, _, _ = c.restore(tree)
    same(restored, tree)
    assert {k: type(v) for k, v in restored.items()} == {k: type(v) for k, v in tree.items()}


def test_the_state_may_be_donated_right_after_save(opened):
    state = make_state(1)
    before = jax.tree.map(np.array, state)
    spoil = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    c = opened()
    c.save(1, state, meta={})
    spoil(state)
    same(c.restore(abstract(make_state()))[0], before)


def test_meta_that_json_cannot_hold_is_refused_at_once(opened):
    with pytest.raises(TypeError):
        opened().save(1, make_state(), meta={"x": object()})


# What is kept


def test_the_last_the_best_and_every_nth_are_kept(opened):
    c = opened(keep_last=2, keep_best=1, keep_every=4)
    filled(c, *range(1, 11), losses=[9, 8, 1, 7, 6, 5, 4, 3, 3, 3])
    assert c.steps() == [3, 4, 8, 9, 10] and c.best() == 3
    assert opened().best() == 3


def test_only_steps_with_a_finite_loss_compete_and_the_newer_of_equals_wins(opened):
    c = filled(opened(keep_last=1, keep_best=2), 1, 2, 3, 4, 5, 6, losses=[float("nan"), 2.0, 2.0, None, 3.0, None])
    assert c.steps() == [2, 3, 6] and c.best() == 3


def test_a_step_that_is_there_is_not_overwritten(opened):
    c = filled(opened(), 1)
    c.save(1, make_state(9), meta={"other": 1})
    restored, meta, _ = c.restore(abstract(make_state()), 1)
    same(restored, make_state(1))
    assert meta == {"config": {"step": 1}}


# Choosing a step, and another model


def test_a_missing_step_lists_those_there_are(opened):
    c = filled(opened(), 2, 5)
    with pytest.raises(InputError, match=r"no checkpoint 3 in .*/c; it has 2, 5"):
        c.restore(abstract(make_state()), 3)
    with pytest.raises(InputError, match="it has none"):
        opened("nowhere").restore(abstract(make_state()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["mlp"].update(kernel=jnp.zeros((16, 9))), r"mlp/kernel as float32\[16, 8\], .* float32\[16, 9\]"),
        (lambda p: p["mlp"].update(kernel=jnp.zeros((16, 8), jnp.bfloat16)), r"float32\[16, 8\], .* bfloat16\[16, 8\]"),
        (lambda p: p["mlp"].update(gate=jnp.zeros(2)), r"no array params/mlp/gate, which is float32\[2\] here"),
        (lambda p: p["mlp"].pop("bias"), r"an array params/mlp/bias, which is not here"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("whole", [True, False])
def test_another_model_is_refused_by_its_first_array(opened, change, message, whole):
    tree = {"params": {"mlp": {"kernel": jnp.zeros((16, 8)), "bias": jnp.zeros(8)}}, "opt": jnp.zeros(3)}
    c = opened()
    for step in (1, 2):
        c.save(step, tree, meta={})
    c.wait()
    other = jax.tree.map(lambda x: x, tree)
    change(other["params"])
    with pytest.raises(InputError, match=message):
        c.restore(other) if whole else c.restore_params(other["params"])
    assert c.steps() == [1, 2]


def test_parameters_are_read_without_the_optimizer(opened, monkeypatch):
    import orbax.checkpoint as ocp

    c = filled(opened(), 4)
    real, seen = ocp.PyTreeCheckpointHandler.restore, []
    monkeypatch.setattr(
        ocp.PyTreeCheckpointHandler, "restore", lambda s, *a, args: seen.extend(args.item) or real(s, *a, args=args)
    )
    params, meta, step = c.restore_params(abstract(make_state().params))
    same(params, make_state(4).params)
    assert (meta, step) == ({"config": {"step": 4}}, 4)
    assert seen == ["params/head/kernel", "params/mlp/bias", "params/mlp/kernel"]


def test_another_part_can_be_read_in_place_of_the_parameters(opened):
    c = opened()
    c.save(1, {"params": {"w": jnp.zeros(2)}, "ema": {"w": jnp.ones(2)}, "emanate": jnp.ones(1)}, meta={})
    c.wait()
    same(c.restore_params({"w": jnp.zeros(2)}, part="ema")[0], {"w": jnp.ones(2)})


# Formats


def rewrite(folder, change):
    record = json.loads((folder / "meta.json").read_text())
    change(record)
    (folder / "meta.json").write_text(json.dumps(record))


def test_a_newer_format_is_refused_with_both_versions(opened, tmp_path):
    c = filled(opened(), 1, 2)
    rewrite(tmp_path / "c" / "2", lambda r: r.update(format=5))
    with pytest.raises(InputError, match=r"c/2 has format 5, .* up to format 1"):
        c.restore(abstract(make_state()))
    assert c.steps() == [1, 2]


def test_an_older_format_is_upgraded(opened, tmp_path, monkeypatch):
    c = opened()
    c.save(1, {"weights": jnp.ones(3), "bias": jnp.zeros(3)}, meta={})
    c.wait()
    like = {"params": jnp.zeros(3), "bias": jnp.ones(3)}

    def upgrade(record):
        arrays = dict(record["arrays"])
        arrays["params"] = arrays.pop("weights")
        return {**record, "arrays": arrays, "meta": {"upgraded": True}}

    rewrite(tmp_path / "c" / "1", lambda r: r.update(format=0))
    with pytest.raises(InputError, match="has format 0; this Aether, at 1, cannot read it"):
        c.restore(like)
    monkeypatch.setitem(UPGRADES, 0, upgrade)
    restored, meta, _ = c.restore(like)
    same(restored, {"params": jnp.ones(3), "bias": jnp.zeros(3)})
    assert meta == {"upgraded": True}


# Damage


@pytest.mark.parametrize("damage", [truncate, remove, flip, no_meta, no_arrays])
def test_a_damaged_newest_is_named_set_aside_and_passed_over(opened, tmp_path, damage):
    filled(opened(), 1, 2)
    damage(tmp_path / "c" / "2")
    said = []
    c = opened(log=said.append)
    restored, _, step = c.restore(abstract(make_state()))
    same(restored, make_state(1))
    assert step == 1 and c.steps() == [1] and (tmp_path / "c" / "damaged-2").exists()
    assert len(said) == 1 and "Checkpoint 2 in " in said[0] and "is damaged" in said[0]
    filled(c, 2)
    same(c.restore(abstract(make_state()))[0], make_state(2))


def test_a_damaged_step_that_was_asked_for_is_refused_and_stays(opened, tmp_path):
    c = filled(opened(), 1, 2)
    truncate(tmp_path / "c" / "2")
    with pytest.raises(StorageError, match="Checkpoint 2 in .*d/.* has 10 bytes, not"):
        c.restore(abstract(make_state()), 2)
    assert c.steps() == [1, 2]


def test_when_none_can_be_read_all_stay_and_the_folder_is_named(opened, tmp_path):
    c = filled(opened(), 1, 2)
    truncate(tmp_path / "c" / "1")
    truncate(tmp_path / "c" / "2")
    with pytest.raises(StorageError, match=r"None of the checkpoints in .*/c can be read \(1, 2\)"):
        c.restore(abstract(make_state()))
    assert c.steps() == [1, 2]


def test_a_second_damaged_one_of_the_same_step_replaces_the_first(opened, tmp_path):
    c = filled(opened(), 1)
    for _ in range(2):
        filled(c, 2)
        truncate(tmp_path / "c" / "2")
        assert c.restore(abstract(make_state()))[2] == 1
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["1", "damaged-2"]


def test_lack_of_memory_or_permission_is_not_damage(opened, tmp_path, monkeypatch):
    c = filled(opened(), 1, 2)
    for error, raised in [(MemoryError(), MemoryError), (PermissionError("no"), StorageError)]:

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(tensors, "read", fail)
        with pytest.raises(raised):
            c.restore(abstract(make_state()))
    assert c.steps() == [1, 2]


# Other processes


def test_what_is_being_deleted_no_longer_looks_like_a_checkpoint(opened, monkeypatch):
    c = opened(keep_last=1)
    deleted, real = [], type(c._home.folder).rmtree
    monkeypatch.setattr(
        type(c._home.folder), "rmtree", lambda p, **k: deleted.append((p.name, c.steps())) or real(p, **k)
    )
    filled(c, 1, 2)
    assert deleted == [("deleted-1", [2])]


def test_reading_parameters_leaves_alone_what_another_process_is_writing(opened, tmp_path):
    c = filled(opened(), 1)
    for name in ("2.orbax-checkpoint-tmp", "deleted-1"):
        (tmp_path / "c" / name / "state").mkdir(parents=True)
    reader = opened()
    assert reader.steps() == [1]
    reader.restore_params(abstract(make_state().params))
    assert len(list((tmp_path / "c").iterdir())) == 3
    c = opened()
    c.restore(abstract(make_state()))
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["1"]


KILLS = """
    import os, pathlib, random, signal, sys, time
    import jax, jax.numpy as jnp, numpy as np
    import orbax.checkpoint
    from aether.checkpoint import Checkpoints
    from aether.config import CheckpointConfig

    # Children are forked before any backend starts, so that each kill costs no imports.
    home = pathlib.Path(sys.argv[1]); rng = random.Random(0); config = CheckpointConfig(keep_last=2)
    like = {k: jax.ShapeDtypeStruct((250_000,), jnp.float32) for k in "ab"}

    def child(status):
        checkpoints = Checkpoints(str(home), config)
        step = 0
        if checkpoints.latest() is not None:
            newest = checkpoints.latest()
            state, meta, step = checkpoints.restore(like)
            assert step == newest == meta["step"], (step, newest, meta)
            assert all((np.asarray(v) == step).all() for v in state.values())
            assert all(p.name.isdecimal() for p in home.iterdir()), list(home.iterdir())
        os.write(status, step.to_bytes(4, "little"))
        while True:
            step += 1
            checkpoints.save(step, {k: jnp.full(250_000, step, jnp.float32) for k in "ab"}, meta={"step": step})
            os.write(status, step.to_bytes(4, "little"))  # so the step before is complete

    committed, unfinished = 0, 0
    for _ in range(12):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                child(write)
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                os._exit(1)
        os.close(write)
        restored = int.from_bytes(os.read(read, 4), "little")  # empty, hence 0, if the child failed
        assert restored >= committed, (restored, committed)
        for _ in range(rng.randint(1, 4)):
            committed = max(restored, int.from_bytes(os.read(read, 4), "little") - 1)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "the child failed"
        unfinished += any(not p.name.isdecimal() for p in home.iterdir())
    print(committed, unfinished)
    assert committed >= 10 and unfinished >= 1, (committed, unfinished)
"""


def test_a_kill_at_any_moment_leaves_complete_checkpoints(tmp_path):
    script = textwrap.dedent(KILLS).replace("sys.argv[1]", repr(str(tmp_path / "c")))
    run(script)


# Storage


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if not shutil.which("mount") or subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk], capture_output=True
    ).returncode:  # fmt: skip
        pytest.skip("a small file system can be mounted by root only")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_is_named_and_earlier_checkpoints_stay(opened, small_disk):
    def state(n):
        return {"w": jax.random.normal(jax.random.key(n), (250_000,))}

    c = opened(small_disk / "c")
    c.save(1, state(1), meta={})
    c.wait()
    (small_disk / "ballast").write_bytes(bytes(4_600_000))
    with pytest.raises(StorageError, match=r"No space is left for checkpoints in .*disk/c; .*Earlier checkpoints are"):
        c.save(2, state(2), meta={})
        c.save(3, state(2), meta={})
    assert [p.name for p in (small_disk / "c").iterdir()] == ["1"]
    same(c.restore(abstract(state(0)))[0], state(1))
    (small_disk / "ballast").unlink()
    c.save(2, state(2), meta={})
    c.wait()
    same(c.restore(abstract(state(0)))[0], state(2))


def test_a_folder_that_cannot_be_made_is_a_storage_error(opened, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Cannot write checkpoints in .*file/c"):
        filled(opened(tmp_path / "file" / "c"), 1)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(5, "Input/output error"), "Cannot write checkpoints in .*Input/output error"),
        (OSError(errno.ENOSPC, "voll"), "No space is left"),
        (ValueError("RESOURCE_EXHAUSTED: write"), "No space is left"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: device memory"), "Cannot write .*device memory"),
    ],
)
def test_an_error_of_the_writer_is_found_at_the_next_save(opened, monkeypatch, error, message):
    c = opened()

    def fail(*_):
        raise RuntimeError("while writing") from error

    with monkeypatch.context() as m:
        m.setattr(storage, "fingerprint", fail)
        c.save(1, make_state(1), meta={})
        with pytest.raises(StorageError, match=message):
            c.save(2, make_state(2), meta={})
    filled(c, 1)
    assert c.steps() == [1]


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """Make s3://... a folder on the disk."""
    from etils.epath import backend
    from fsspec.implementations.local import LocalFileSystem

    class Bucket(LocalFileSystem):
        protocol = "s3"

        @classmethod
        def _strip_protocol(cls, path):
            path = os.fspath(path)
            return str(tmp_path / path.removeprefix("s3://")) if path.startswith("s3://") else path.rstrip("/")

    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: Bucket(auto_mkdir=True))
    return tmp_path / "bucket"


def test_an_object_store_without_arrays_in_orbax_works_through_a_stage(opened, bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    bucket.mkdir()
    c = filled(opened("s3://bucket/run", keep_last=2), 1, 2, 3)
    assert c.steps() == [2, 3] and not list(c._writer._stage.iterdir())
    c.close()
    (bucket / "run" / "3" / MARKER).unlink()  # what a kill during the upload leaves
    c = opened("s3://bucket/run", keep_last=2)
    assert c.steps() == [2]
    restored, _, step = c.restore(abstract(make_state()))
    same(restored, make_state(2))
    assert step == 2 and [p.name for p in (bucket / "run").iterdir()] == ["2"]
    filled(c, 3)
    truncate(bucket / "run" / "3")
    assert c.restore(abstract(make_state()))[2] == 2 and c.steps() == [2]
    c.close()
    assert not list(pathlib.Path(tmp_path).glob("aether-*"))


def test_orbax_does_not_talk_to_the_user(opened):
    heard = []
    handler = logging.Handler()
    handler.emit = heard.append
    logger = logging.getLogger("absl")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        c = filled(opened(), 1)
        c.restore(abstract(make_state()))
        assert not heard
        logger.info("others are heard")
        assert len(heard) == 1
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
