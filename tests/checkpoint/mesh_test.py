"""A checkpoint is bit-equal on any other mesh, of one process or of several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from aether import arrays
from aether.checkpoint import Checkpoints
from aether.config import CheckpointConfig, MeshConfig
from aether.parallel import make_mesh

MESHES = [
    dict(data=8),
    dict(data=1, fsdp=8),
    dict(data=2, fsdp=2, tensor=2),
    dict(data=2, sequence=4),
    dict(data=1, fsdp=2, sequence=2, tensor=2),
    dict(data=1, tensor=8),
]
SPECS = {
    "embedding": ((16, 24), P("tensor", "fsdp")),
    "kernel": ((3, 8, 16), P(None, "fsdp", "tensor")),
    "moment": ((16, 8), P(("data", "fsdp"), None)),
    "sequence": ((8, 16), P("sequence", "tensor")),
    "scale": ((8,), P()),
    "step": ((), P()),
}


def state(mesh, seed=0):
    """Return arrays of random bits, in the layouts of `SPECS` on this mesh."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, (shape, spec) in SPECS.items():
        bits = rng.integers(0, 2**32, shape, dtype=np.uint32)
        values = {"step": bits.astype(np.int32)}.get(name, bits.view(np.float32) if shape else bits)
        if name == "moment":
            values = values.astype(jnp.bfloat16)
        made[name] = jax.device_put(values, NamedSharding(mesh, spec))
    return made


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint from each mesh: step i by MESHES[i]."""
    folder = tmp_path_factory.mktemp("meshes")
    c = Checkpoints(str(folder), CheckpointConfig(keep_last=100))
    for i, sizes in enumerate(MESHES):
        c.save(i, state(make_mesh(MeshConfig(**sizes)), i), meta={})
    c.close()
    return folder


@pytest.mark.parametrize("sizes", [*MESHES, None], ids=str)
def test_every_mesh_reads_what_any_other_wrote(saved, sizes):
    mesh = make_mesh(MeshConfig(**(sizes or {})), jax.devices() if sizes else jax.devices()[:1])
    c = Checkpoints(str(saved), CheckpointConfig())
    for i in range(len(MESHES)):
        wanted = state(mesh, i)
        like = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=v.sharding) for k, v in wanted.items()}
        got, _, _ = c.restore(like, i)
        for name, value in wanted.items():
            assert got[name].sharding == value.sharding
            assert np.asarray(got[name]).tobytes() == np.asarray(value).tobytes(), (i, name)


def test_a_copy_for_the_writer_shares_no_memory():
    for value in state(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))).values():
        pairs = zip(value.addressable_shards, arrays.owned(value).addressable_shards, strict=True)
        assert all(a.data.unsafe_buffer_pointer() != b.data.unsafe_buffer_pointer() for a, b in pairs)


COUNTS = """
    import hashlib
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from aether.checkpoint import Checkpoints
    from aether.config import CheckpointConfig, MeshConfig
    from aether.parallel import make_mesh

    n = jax.process_count()
    mesh = make_mesh(MeshConfig(data=1, fsdp=n, tensor=-1))
    def put(value, spec):
        return jax.make_array_from_callback(value.shape, NamedSharding(mesh, spec), lambda i: value[i])
    def make(step):
        rng = np.random.default_rng(step)
        bits = lambda *shape: rng.integers(0, 2**32, shape, dtype=np.uint32)
        return {"w": put(bits(8, 16).view(np.float32), P("fsdp", "tensor")), "v": put(bits(16), P(("fsdp", "tensor"))),
                "n": put(np.int32(step), P())}
    def check(got, step):
        for name, value in make(step).items():
            for a, b in zip(got[name].addressable_shards, value.addressable_shards, strict=True):
                assert np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes(), (name, step)
    c = Checkpoints(HOME, CheckpointConfig(keep_last=100))
    for step in c.steps():
        check(c.restore(make(99), step)[0], step)
    new = (c.latest() or 0) + 1
    c.save(new, make(new), meta={})
    check(c.restore(make(99))[0], new)
    c.close()
    print(len(c.steps()))
"""


@pytest.mark.slow
def test_two_one_four_processes_read_each_others_checkpoints(tmp_path, run_processes):
    """Also with other numbers of devices a process."""
    for i, (count, devices) in enumerate([(2, 1), (1, 2), (4, 1), (2, 2)], 1):
        outs = run_processes(COUNTS.replace("HOME", repr(str(tmp_path / "c"))), count, devices)
        assert [out.split()[-1] for out in outs] == [str(i)] * count
