"""Aether-ViT and ViT: against NumPy in float64, patches, pooling, heads, sizes, dropout, the mesh."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from aether.config import MeshConfig, ModelConfig
from aether.models import ViT
from aether.models.vit import cut
from aether.parallel import BATCH, make_mesh, shardings
from tools import reference

SIDE, PATCH, CHANNELS, CLASSES = 6, 2, 3, 5
KINDS = ("aether_vit", "vit")
# timm 1.0's counts for ViT/16 at 224 pixels with a class token, less those of its head of 1000 classes.
SIZES = dict(ti=5_717_416 - 193_000, s=22_050_664 - 385_000, b=86_567_656 - 769_000)


def config(kind, **model):
    shape = dict(layers=2, heads=4, width=16, patch=PATCH, dtype="float32")
    return ModelConfig(kind=kind, **{**shape, **model}).resolved(CLASSES, SIDE)


def drawn(kind, **model):
    """Make a model with parameters from N(0, 1/9): nothing to compile, and no zeros."""
    rng = np.random.default_rng(0)
    graph, shapes = nnx.split(nnx.eval_shape(lambda: ViT(config(kind, **model), SIDE, CHANNELS, nnx.Rngs(0))))
    return nnx.merge(graph, jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) / 3, s.dtype), shapes))


def started(kind, **model):
    make = lambda: ViT(config(kind, **model), SIDE, CHANNELS, nnx.Rngs(0))  # noqa: E731
    graph = nnx.graphdef(nnx.eval_shape(make))
    return nnx.merge(graph, jax.jit(lambda: nnx.state(make()))())


def draw_images(rng, count=2):
    return jnp.asarray(rng.normal(size=(count, SIDE, SIDE, CHANNELS)), jnp.float32)


def patches(images):
    """Gather the patches pixel by pixel."""
    side = SIDE // PATCH
    out = np.zeros((len(images), side * side, PATCH * PATCH * CHANNELS))
    for row, column, y, x, c in np.ndindex(side, side, PATCH, PATCH, CHANNELS):
        at = (y * PATCH + x) * CHANNELS + c
        out[:, row * side + column, at] = images[:, row * PATCH + y, column * PATCH + x, c]
    return out


def test_patches_are_cut_row_by_row(rng):
    images = draw_images(rng)
    np.testing.assert_array_equal(cut(images, PATCH), patches(np.asarray(images)))


@pytest.mark.parametrize("pool", ["mean", "class"])
@pytest.mark.parametrize(
    ("kind", "head", "position"),
    [("aether_vit", "yat", "rotary"), ("vit", "linear", "learned")],
)
def test_the_network_is_the_reference(rng, kind, head, position, pool):
    model, images = drawn(kind, head=head, position=position, pool=pool), draw_images(rng)
    p = {"/".join(map(str, path)): np.asarray(v[...], np.float64) for path, v in nnx.to_flat_state(nnx.state(model))}
    x = patches(np.asarray(images, np.float64)) @ p["patches/kernel"] + p.get("patches/bias", 0.0)
    if pool == "class":
        x = np.concatenate([np.broadcast_to(p["token/embedding"], (2, 1, 16)), x], 1)
    turned = np.broadcast_to(np.arange(x.shape[1]), x.shape[:2]) if position == "rotary" else None
    x = reference.encoder(p, x + p.get("position/embedding", 0.0), 4, positions=turned)
    x = x[:, 0] if pool == "class" else x.mean(1)
    if head == "yat":
        bias, epsilon = (np.logaddexp(0, p[f"head/{name}"]) for name in ("bias", "epsilon_param"))
        unit = dict(bias=bias, epsilon=epsilon, alpha=p["head/alpha"])
        want = reference.yat(x, p["head/kernel"], spherical=True, **unit)
    else:
        want = x @ p["head/kernel"] + p.get("head/bias", 0.0)
    got = jax.jit(model)(images)
    assert got.shape == (2, CLASSES) and got.dtype == "float32"
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_those_of_vit(size):
    def count(kind):
        c = ModelConfig(kind=kind, size=size, pool="class").resolved(1000, 224)
        assert c.patch == 16
        state = nnx.state(nnx.eval_shape(lambda: ViT(c, 224, 3, nnx.Rngs(0))))
        return sum(math.prod(v.shape) for path, v in nnx.to_flat_state(state) if path[0] != "head")

    assert count("vit") == SIZES[size]
    assert abs(count("aether_vit") / SIZES[size] - 1) < 0.02


def test_tokens_of_normalised_images_start_at_one(rng):
    model = started("aether_vit", width=64)
    tokens = np.asarray(cut(draw_images(rng, 64), PATCH) @ model.patches.kernel[...])
    assert tokens.std() == pytest.approx(1.0, rel=0.1)
    assert float(model.position.embedding[...].std()) == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("head", ["linear", "yat"])
def test_the_loss_starts_near_that_of_a_guess(rng, head):
    model = started("aether_vit", head=head, width=64)
    chances = jax.nn.log_softmax(jax.jit(model)(draw_images(rng, 32)))
    assert abs(float(-chances.mean()) - math.log(CLASSES)) < 0.3


def test_dropout_is_a_function_of_its_key(rng):
    model, dry, images = drawn("vit", dropout=0.5), drawn("vit"), draw_images(rng)
    run = jax.jit(lambda k: (model(images, k), model(images, key=None), dry(images, k)))
    (one, still, same), (other, _, _) = run(jax.random.key(1)), run(jax.random.key(2))
    np.testing.assert_array_equal(one, run(jax.random.key(1))[0])
    np.testing.assert_array_equal(still, same)  # the same seed, so the same parameters
    assert (one != other).any() and (one != still).any()


def test_images_that_do_not_fit_are_refused(rng):
    model = drawn("vit")
    with pytest.raises(ValueError, match=r"images are \(2, 6, 6, 1\); this network was made for \(b, 6, 6, 3\)"):
        model(draw_images(rng)[..., :1])
    with pytest.raises(ValueError, match=r"image_size is 7 and model.patch 2"):
        ViT(config("vit"), 7, CHANNELS, nnx.Rngs(0))


@pytest.mark.parametrize("head", ["linear", pytest.param("yat", marks=pytest.mark.slow)])
def test_the_mesh_changes_nothing(rng, head):
    """Rows over data and fsdp, heads over tensor; classes, patches and pixels stay whole."""
    graph, params = nnx.split(drawn("aether_vit", head=head))
    images = draw_images(rng, 4)

    def loss(params, images):
        return jnp.sum(jnp.sin(nnx.merge(graph, params)(images)))

    want, slope = jax.jit(jax.value_and_grad(loss))(params, images)
    c = MeshConfig(data=2, fsdp=2, tensor=2)
    mesh = make_mesh(c)
    where = shardings(params, mesh, c)
    spread = jax.device_put(params, where)
    assert spread["blocks"]["attention"]["query"]["kernel"][...].sharding.spec == P(None, "fsdp", "tensor")
    assert spread["head"]["kernel"][...].sharding.spec == P("fsdp", None)
    assert spread["patches"]["kernel"][...].sharding.spec == P(None, "fsdp")
    rows = jax.device_put(images, NamedSharding(mesh, BATCH))
    with jax.set_mesh(mesh):
        run = jax.jit(jax.value_and_grad(loss), out_shardings=(None, where))
        got, found = run(spread, rows)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    largest = max(float(jnp.linalg.norm(a)) for a in jax.tree.leaves(slope))
    for a, b in zip(jax.tree.leaves(slope), jax.tree.leaves(found), strict=True):
        assert float(np.linalg.norm(a - b)) < 1e-3 * float(jnp.linalg.norm(a)) + 1e-4 * largest
