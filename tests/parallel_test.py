"""The mesh, the table of axes, and that training does not depend on how devices are arranged."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from aether.config import MeshConfig
from aether.errors import InputError
from aether.parallel import RULES, check_batch, make_mesh, shardings, spec, to_global
from aether.testing import tiny_batch, tiny_config


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((-1, 1, 1), (8, 1, 1)),
        ((2, -1, 1), (2, 4, 1)),
        ((2, 2, -1), (2, 2, 2)),
        ((1, 1, 8), (1, 1, 8)),
        ((8, -1, 1), (8, 1, 1)),
    ],
)
def test_the_mesh_has_the_shape_asked_for(sizes, shape):
    mesh = make_mesh(MeshConfig(*sizes))
    assert tuple(mesh.shape.values()) == shape and tuple(mesh.shape) == ("data", "fsdp", "tensor")
    assert mesh.devices.size == 8


@pytest.mark.parametrize("sizes", [(-1, -1, 1), (0, 1, 1), (3, -1, 1), (2, 2, 1), (16, 1, 1)])
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(InputError, match=f"mesh.data={sizes[0]}, mesh.fsdp={sizes[1]}, mesh.tensor={sizes[2]}"):
        make_mesh(MeshConfig(*sizes))


def test_a_mesh_takes_a_share_of_the_devices():
    mesh = make_mesh(MeshConfig(1, 1, 4), jax.devices()[:4])
    assert list(mesh.devices.flat) == jax.devices()[:4]


def test_spec_maps_names_and_refuses_collisions():
    assert spec(("layers", "embed", "mlp")) == P(None, "fsdp", "tensor")
    assert spec((None,)) == P(None)
    with pytest.raises(ValueError, match="unknown logical axis 'width'"):
        spec(("width",))
    with pytest.raises(ValueError, match="twice"):
        spec(("heads", "mlp"))


def test_every_leaf_lies_as_its_axes_say_moments_too(trainer):
    config = tiny_config(mesh=dict(data=2, fsdp=2, tensor=2), train=dict(ema=0.9))
    state, _ = trainer(config, jax.devices())
    split = {"embed", "heads", "mlp", "vocab"}
    seen = []
    for path, v in jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda v: isinstance(v, nnx.Variable))[0]:
        array = v[...] if isinstance(v, nnx.Variable) else v
        axes = v.get_metadata()["axes"] if isinstance(v, nnx.Variable) else (None,) * array.ndim
        wanted = [size // 2 if axis in split else size for size, axis in zip(array.shape, axes, strict=True)]
        assert {s.data.shape for s in array.addressable_shards} == {tuple(wanted)}, jax.tree_util.keystr(path)
        seen.append(jax.tree_util.keystr(path))
    kernels = [path for path in seen if "mlp" in path and "hidden" in path and "kernel" in path]
    assert len(kernels) == 4  # the parameter, its two moments, its average
    assert split < set(RULES)


def test_a_dimension_that_does_not_divide_is_named(trainer):
    with pytest.raises(
        InputError, match=r"^params/blocks/.* has a dimension of 4, which mesh.tensor=3 does not divide"
    ):
        trainer(tiny_config(mesh=dict(data=1, fsdp=1, tensor=3)), jax.devices()[:3])


def test_a_batch_that_does_not_divide_is_refused():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    check_batch(8, 2, mesh)
    with pytest.raises(InputError, match="data.batch_size is 8, in 4 microbatches.*multiple of 16"):
        check_batch(8, 4, mesh)
    with pytest.raises(InputError, match="data.batch_size is 6"):
        check_batch(6, 1, mesh)


def test_to_global_splits_the_rows():
    batch = tiny_batch(tiny_config())
    for k, v in to_global(batch, make_mesh(MeshConfig(2, 2, 2))).items():
        assert {s.data.shape for s in v.addressable_shards} == {(2, *v.shape[1:])}
        np.testing.assert_array_equal(v, batch[k])


def five_losses(trainer, config, devices):
    state, step = trainer(config, devices)
    mesh = make_mesh(config.mesh, devices)
    losses = []
    for i in range(5):
        state, metrics = step(state, to_global(tiny_batch(config, i), mesh))
        losses.append(float(metrics["loss"]))
    where = shardings(state, mesh).params["blocks"]["mlp"]["hidden"]["kernel"]
    assert state.params["blocks"]["mlp"]["hidden"]["kernel"][...].sharding.is_equivalent_to(where, 3)
    return losses


@pytest.mark.parametrize(
    ("kind", "meshes"),
    [
        ("aether", [(2, 2, 2)]),
        pytest.param("aether", [(8, 1, 1), (2, 4, 1), (1, 1, 4)], marks=pytest.mark.slow),
        pytest.param("gpt2", [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 4)], marks=pytest.mark.slow),
    ],
)
def test_five_steps_are_the_same_on_every_mesh(trainer, kind, meshes):
    losses = [five_losses(trainer, tiny_config(kind), jax.devices()[:1])]
    for data, fsdp, tensor in meshes:
        config = tiny_config(kind, mesh=dict(data=data, fsdp=fsdp, tensor=tensor))
        losses.append(five_losses(trainer, config, jax.devices()[: data * fsdp * tensor]))
    assert losses[0][-1] < losses[0][0]
    for found, sizes in zip(losses[1:], meshes, strict=True):
        assert found == pytest.approx(losses[0], rel=1e-5), sizes
