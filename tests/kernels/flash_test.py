"""Which kernel flash attention takes, what it says where there is none, meshes, and the compilers of TPUs."""

import os
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from aether.chips import topology
from aether.config import MeshConfig
from aether.kernels import flash
from aether.kernels.attention import DotScore, YatScore, attention
from aether.kernels.masks import Mask
from aether.kernels.normalization import Normalization
from aether.kernels.pallas import tpu
from aether.kernels.pallas.blocks import Blocks
from aether.kernels.pallas.device import device
from aether.losses import LOSSES
from aether.nn import YatAttention
from aether.parallel import make_mesh
from aether.plan import machine
from aether.plan.collectives import collectives
from aether.plan.counts import count
from aether.plan.measure import layout_of
from aether.plan.read import parse
from aether.testing import tiny_config
from aether.train.setup import compile_step, describe_state


@pytest.fixture
def interpreted(monkeypatch):
    """Make the TPU's kernels those of the CPU, interpreted, in small blocks."""
    options = dict(interpret=True, blocks=Blocks(8, 8, 16, 2**20))
    kernel = SimpleNamespace(
        unsupported=tpu.unsupported,
        forward=partial(tpu.forward, **options),
        backward=partial(tpu.backward, **options),
    )
    monkeypatch.setattr(flash, "PLATFORMS", ("cpu",))
    monkeypatch.setattr(flash, "kernels", lambda platform: kernel)


@pytest.fixture(scope="module")
def chips():
    """A function name -> devices that are not here."""
    pytest.importorskip("libtpu")
    before = dict(os.environ)
    machine.prepare([])
    yield lambda name: machine.devices_of(topology(name))
    os.environ.clear()
    os.environ.update(before)


def make(rng, t=20, width=8, heads=4):
    sizes = ((2, t, heads, width), (2, t, 2, width), (2, t, 2, width))
    return [jnp.asarray(rng.normal(size=size), jnp.float32) for size in sizes]


def test_without_a_kernel_auto_is_another_form_and_flash_says_so(rng):
    q, k, v = make(rng)
    score = YatScore(0.1, 2.0, 0.3)
    with pytest.raises(ValueError, match=r'impl is "flash". There is no flash kernel for cpu \(cpu\), only for .*tpu'):
        attention(q, k, v, score, impl="flash")
    for length, impl in ((20, "plain"), (300, "blockwise")):
        x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        auto, named = (
            str(jax.make_jaxpr(lambda q, impl=impl: attention(q, q, q, score, impl=impl))(x)) for impl in ("auto", impl)
        )
        assert auto == named and ("scan" in auto) == (impl == "blockwise")


def test_what_a_kernel_does_not_do_falls_back_or_is_named(rng, interpreted):
    q, k, v = make(rng)
    score, softermax = YatScore(0.1, 2.0, 0.3), Normalization("softermax", 2.0)
    for said, changes in {
        "normalization='softermax'": dict(normalization=softermax),
        "distance='exact'": dict(score=replace(score, distance="exact")),
        "a dense mask": dict(mask=Mask(dense=jnp.ones((20, 20), bool))),
        "a score of type function": dict(score=lambda q, k: q @ k.swapaxes(-1, -2)),
        "heads of width 12, only multiples of 8 up to 256": dict(
            k=jnp.ones((2, 20, 2, 12)), q=jnp.ones((2, 20, 4, 12))
        ),
    }.items():
        with pytest.raises(ValueError, match=f'does not take {said}. Take impl="auto"'):
            attention(**dict(q=q, k=k, v=v, score=score, impl="flash") | changes)
    same = [attention(q, k, v, score, normalization=softermax, impl=impl) for impl in ("auto", "plain")]
    np.testing.assert_array_equal(*same)
    assert "pallas_call" in str(jax.make_jaxpr(lambda q: attention(q, k, v, score, impl="auto"))(q))
    one = attention(q[:, :1], k, v, score, impl="flash")  # a single query is never worth a kernel
    np.testing.assert_array_equal(one, attention(q[:, :1], k, v, score, impl="plain"))


def test_a_gpu_too_old_for_the_kernel_takes_another_form():
    q, k = (jax.ShapeDtypeStruct((1, 40, heads, 64), jnp.bfloat16) for heads in (4, 2))
    for kind, taken in (("NVIDIA A100-SXM4-40GB", True), ("NVIDIA TITAN RTX", False)):
        mesh = AbstractMesh((1,), ("data",), abstract_device=AbstractDevice(kind, 1, "cuda"))
        with jax.sharding.use_abstract_mesh(mesh):
            jaxpr = jax.make_jaxpr(lambda q, k: attention(q, k, k, DotScore(), impl="auto"))(q, k)
        assert ("pallas_call" in str(jaxpr)) == taken


def test_the_kernel_is_that_of_the_mesh_in_force(chips):
    assert device() == ("cpu", "cpu")
    with jax.set_mesh(make_mesh(MeshConfig(), chips("v5e:2x2")[:1])):
        assert device() == ("tpu", "TPU v5 lite")
        assert jax.jit(lambda x: x if device().platform == "tpu" else None).eval_shape(1.0) is not None


@pytest.mark.parametrize(
    "sizes", [dict(data=2, fsdp=2, sequence=2), dict(data=2, sequence=2, tensor=2), dict(data=1, tensor=2, fsdp=4)]
)
def test_on_a_mesh_each_device_attends_for_its_own_part(interpreted, sizes):
    """Values and all gradients are those of one device and of the plain form, with windows, segments and padding."""
    layer = YatAttention(32, 4, num_kv_heads=2, window=9, normalization="l1", learnable_epsilon=True, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    keys = jax.random.split(jax.random.key(0), 2)
    x, weight = (jax.random.normal(key, (4, 24, 32)) for key in keys)
    segments, valid = (
        jnp.arange(24)[None] // 10 + jnp.zeros((4, 1), int),
        jnp.arange(24)[None] % 5 != jnp.arange(4)[:, None],
    )

    def loss(impl, params, x):
        attend = nnx.merge(graph, params)
        attend.impl = impl
        y, _ = attend(x, is_causal=True, segments=segments, valid=valid)
        return jnp.sum(weight * y)

    def run(mesh, impl):
        with jax.set_mesh(mesh):
            return jax.jit(jax.value_and_grad(partial(loss, impl), (0, 1)))(params, x)

    want = run(make_mesh(MeshConfig(), jax.devices()[:1]), "plain")
    found = run(make_mesh(MeshConfig(**sizes)), "flash")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, np.abs(b).max()))


def test_an_axis_that_does_not_divide_is_left_to_the_compiler_and_takes_another_form(interpreted):
    layer = YatAttention(16, 2, rngs=nnx.Rngs(0), impl="flash")
    x = jnp.ones((3, 8, 16))
    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=4))):
        with pytest.raises(ValueError, match="cannot split a kernel over mesh axes .*data=2, tensor=4"):
            jax.jit(lambda x: layer(x)[0])(x)
        layer.impl = "auto"
        assert jax.jit(lambda x: layer(x)[0])(x).shape == x.shape


def gradients(mesh, t, width, dtype, *, score="yat", n="softmax", told=None, heads=4):
    """Compile forward and backward pass of attention for one device, and return the program."""
    where = NamedSharding(mesh, P())

    def of(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def loss(q, k, v, bias, alpha, epsilon, mask):
        how = DotScore() if score == "dot" else YatScore(bias, alpha, epsilon, spherical=score == "spherical")
        y = attention(q, k, v, how, mask=mask, normalization=Normalization(n), impl="flash")
        return jnp.sum(y.astype(jnp.float32))

    numbers = [of(heads, dtype=jnp.float32)] * 3
    mask = Mask(**{k: of(1, t, dtype=v) if isinstance(v, type) else v for k, v in (told or {}).items()})
    with jax.set_mesh(mesh):
        operands = of(1, t, heads, width), of(1, t, 2, width), of(1, t, 2, width)
        return jax.jit(jax.grad(loss, range(6))).lower(*operands, *numbers, mask).compile()


SEGMENTS = dict(query_segments=jnp.int32, key_segments=jnp.int32)


@pytest.mark.parametrize(
    ("chip", "t", "width", "dtype", "options"),
    [
        ("v5e:2x2", 384, 40, jnp.bfloat16, dict(n="l1", told=dict(window=130, valid=jnp.bool_))),
        ("v5p:2x2x1", 384, 64, jnp.bfloat16, dict(told=dict(causal=True) | SEGMENTS)),
        ("v6e:2x2", 130, 64, jnp.float32, dict(score="dot", told=dict(causal=True))),
        ("v4:2x2x1", 384, 64, jnp.bfloat16, dict(told=dict(causal=True))),
        *(
            pytest.param(*more, marks=pytest.mark.slow)
            for more in [
                ("v5e:2x2", 2048, 64, jnp.bfloat16, dict(told=dict(causal=True))),
                ("v5e:2x2", 200, 32, jnp.float32, dict(score="spherical", n="l1", told=SEGMENTS)),
                ("v5e:2x2", 384, 128, jnp.bfloat16, dict(score="dot", told=dict(causal=True))),
                ("v5p:2x2x1", 130, 128, jnp.float32, dict(score="spherical")),
                ("v6e:2x2", 384, 128, jnp.bfloat16, dict(told=dict(window=200))),
            ]
        ),
    ],
)
def test_the_compilers_of_tpus_take_it(chips, chip, t, width, dtype, options):
    mesh = make_mesh(MeshConfig(), chips(chip)[:1])
    text = gradients(mesh, t, width, dtype, **options).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2


@pytest.mark.parametrize(("impl", "context"), [("flash", 128), pytest.param("blockwise", 512, marks=pytest.mark.slow)])
def test_a_training_step_on_four_chips(chips, impl, context):
    """Rows over fsdp, heads over tensor: kernels see a quarter, and gradients of b, α and ε cross once a layer."""
    config = tiny_config(
        mesh=dict(data=1, fsdp=2, tensor=2),
        model=dict(heads=4, width=32, attention_impl=impl, dtype="bfloat16"),
        data=dict(context=context, batch_size=4),
        train=dict(loss_chunk=1024),
    )
    layers = config.model.layers
    mesh = make_mesh(config.mesh, chips("v5e:2x2"))
    graph, _, like = describe_state(config, mesh)
    text = compile_step(config, graph, LOSSES["lm"], like, mesh).as_text()
    module = parse(text)
    found = collectives(module, layout_of(mesh, topology("v5e:2x2")))
    sums = [c for c in found if c.kind == "all-reduce" and "losses" not in c.source]
    assert max(c.count for c in sums) == layers
    assert any(c.axes == ("fsdp",) and c.dtype == "f32" and c.count == layers for c in sums)
    calls = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    counts = count(module)
    assert not counts.uncounted and sum(counts.stated.values()) == (2 * layers if impl == "flash" else 0)
    assert len(calls) == (2 if impl == "flash" else 0) and all("[2,2,1,128,8]" in line for line in calls)
