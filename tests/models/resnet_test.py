"""AetherResNet and ResNet: sizes, NumPy in float64, the scale of the first step, statistics and meshes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aether.config import MeshConfig, ModelConfig
from aether.models.resnet import ResNet
from aether.parallel import make_mesh, shardings, to_global
from tools import reference

KINDS = ("aether_resnet", "resnet")
TINY = dict(stages="1,2", width=4, stem="stride2", dtype="float32")


def config(kind, classes=10, **fields):
    return ModelConfig(kind=kind, **fields).resolved(classes, 32)


def shapes(c, channels=3):
    model = nnx.eval_shape(lambda: ResNet(c, channels, nnx.Rngs(0)))
    return {"/".join(map(str, path)): v for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def count(c):
    return sum(math.prod(v.shape) for v in shapes(c).values())


def made(c, channels=3, seed=0):
    """The model of its own initialisation, compiled as one function."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: ResNet(c, channels, nnx.Rngs(0))))
    init = jax.jit(lambda: nnx.state(ResNet(c, channels, nnx.Rngs(seed))))
    return nnx.merge(graph, init())


def drawn(c, channels=3):
    """The model with parameters from N(0, 1/9), no zeros, and variances above zero."""
    rng = np.random.default_rng(0)
    graph, state = nnx.split(nnx.eval_shape(lambda: ResNet(c, channels, nnx.Rngs(0))))

    def draw(path, v):
        value = rng.uniform(0.5, 2, v.shape) if "var" in map(str, path) else rng.normal(size=v.shape) / 3
        return v.replace(jnp.asarray(value, jnp.float32))

    flat = {path: draw(path, v) for path, v in nnx.to_flat_state(state)}
    return nnx.merge(graph, nnx.from_flat_state(flat))


def forward(model, x, key=None):
    """Return the logits, and the model after the call."""
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, x):
        model = nnx.merge(graph, state)
        return model(x, key), nnx.state(model)

    y, state = run(state, x)
    return y, nnx.merge(graph, state)


@pytest.mark.parametrize(
    ("size", "baseline"), [("18", 11_173_962), ("34", 21_282_122), ("50", 23_520_842), ("101", 42_512_970)]
)
def test_sizes_are_the_field_s_and_those_of_both_kinds_within_two_percent(size, baseline):
    """ResNet with a 3×3 stem and ten classes, BatchNorm's statistics not counted."""
    ours, theirs = (count(config(kind, size=size)) for kind in KINDS)
    assert theirs == baseline and abs(ours / theirs - 1) < 0.02


def test_the_stem_of_imagenet_is_that_of_the_field():
    assert count(config("resnet", 1000, size="18", stem="imagenet")) == 11_689_512
    assert count(config("resnet", 1000, size="50", stem="imagenet")) == 25_557_032


def test_aether_has_no_norm_and_the_baseline_no_unit():
    assert not [path for path in shapes(config("aether_resnet")) if "norm" in path or "scale" in path]
    assert not [path for path in shapes(config("resnet")) if "alpha" in path]
    assert not jax.tree.leaves(nnx.state(made(config("aether_resnet", **TINY)), nnx.BatchStat))


class Numpy:
    """The formulas once more, in float64, from the arrays of a model."""

    def __init__(self, model, train):
        self.train, self.statistics = train, {}
        flat = {"/".join(map(str, path)): v for path, v in nnx.to_flat_state(nnx.state(model))}
        self.values = {path: np.float64(v.get_value()) for path, v in flat.items()}
        self.c = model.config

    def get(self, path, layer):
        value = self.values.get(path)
        return value if value is None or layer is None else value[layer]

    def conv(self, x, path, layer, strides=1):
        w = self.get(f"{path}/kernel", layer)
        if self.c.kind == "aether_resnet" and path.endswith("/out"):
            w = w - w.mean((0, 1, 2))
        options = dict(strides=strides, padding=len(w) // 2, of=lambda patch, kernel: patch @ kernel)
        bias = self.get(f"{path}/bias", layer)
        return reference.yat_conv(x, w, **options) + (0 if bias is None else bias)

    def unit(self, x, path, layer, strides):
        w, bias, alpha, epsilon = (self.get(f"{path}/{k}", layer) for k in ("kernel", "bias", "alpha", "epsilon_param"))
        options = dict(bias=np.log1p(np.exp(bias)), alpha=alpha[0], epsilon=np.log1p(np.exp(epsilon[0])))
        return reference.yat_conv(x, w, strides=strides, padding=1, spherical=self.c.conv_spherical, **options)

    def normalized(self, x, path, layer, strides=1):
        x = self.conv(x, f"{path}/conv", layer, strides)
        scale, bias, mean, var = (self.get(f"{path}/norm/{k}", layer) for k in ("scale", "bias", "mean", "var"))
        if self.train:
            self.statistics[path, layer] = x.mean((0, 1, 2)), x.var((0, 1, 2))
            mean, var = self.statistics[path, layer]
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    def block(self, x, path, layer, strides):
        yat = self.c.kind == "aether_resnet"
        plain, h = self.conv if yat else self.normalized, x
        relu = (lambda x: x) if yat else (lambda x: np.maximum(x, 0))
        if self.c.bottleneck:
            h = relu(plain(h, f"{path}/reduce", layer))
        h = relu((self.unit if yat else self.normalized)(h, f"{path}/hidden", layer, strides))
        h = plain(h, f"{path}/out", layer)
        changes = any(key.startswith(f"{path}/skip") for key in self.values)
        return relu((plain(x, f"{path}/skip", layer, strides) if changes else x) + h)

    def __call__(self, x):
        strides = 1 if self.c.stem == "cifar" else 2
        x = self.conv(x, "stem", None, strides) if self.c.kind == "aether_resnet" else self.stem(x, strides)
        if self.c.stem == "imagenet":
            padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
            h, w = ((n + 1) // 2 for n in x.shape[1:3])
            windows = [padded[:, i : i + 2 * h : 2, j : j + 2 * w : 2][:, :h, :w] for i in range(3) for j in range(3)]
            x = np.max(windows, 0)
        for k, blocks in enumerate(self.c.blocks):
            x = self.block(x, f"stages/{k}/first", None, 1 if k == 0 else 2)
            for layer in range(blocks - 1):
                x = self.block(x, f"stages/{k}/rest", layer, 1)
        x, w, bias = x.mean((1, 2)), self.values["head/kernel"], self.values["head/bias"]
        if self.c.head == "linear":
            return x @ w + bias
        alpha, epsilon = self.values["head/alpha"][0], self.values["head/epsilon_param"][0]
        options = dict(bias=np.log1p(np.exp(bias)), alpha=alpha, epsilon=np.log1p(np.exp(epsilon)))
        return reference.yat(x, w, spherical=self.c.conv_spherical, **options)

    def stem(self, x, strides):
        return np.maximum(self.normalized(x, "stem", None, strides), 0)


@pytest.mark.parametrize(
    ("kind", "fields", "train"),
    [
        ("aether_resnet", dict(), True),
        ("aether_resnet", dict(size="50", head="yat", stem="imagenet", conv_spherical=True), True),
        ("resnet", dict(), True),
        ("resnet", dict(), False),
        ("resnet", dict(size="50", stem="imagenet"), True),
    ],
    ids=str,
)
def test_logits_are_those_of_numpy_in_float64(rng, kind, fields, train):
    model = drawn(config(kind, 5, **{**TINY, **fields}), 2)
    x = np.asarray(rng.normal(size=(3, 9, 8, 2)), np.float32)
    theirs = Numpy(model, train)
    want = theirs(np.float64(x))
    y, after = forward(model, x, jax.random.key(0) if train else None)
    assert y.dtype == "float32"
    np.testing.assert_allclose(y, want, rtol=2e-4, atol=2e-4 * np.abs(want).max())
    values, before = Numpy(after, train).values, theirs.values
    for (path, layer), moments in theirs.statistics.items():
        for name, moment in zip(("mean", "var"), moments, strict=True):
            now, was = (v[f"{path}/norm/{name}"] for v in (values, before))
            now, was = (now, was) if layer is None else (now[layer], was[layer])
            np.testing.assert_allclose(now, 0.9 * was + 0.1 * moment, rtol=1e-3, atol=1e-4)
    if not theirs.statistics:
        jax.tree.map(np.testing.assert_array_equal, values, before)


def stepped(model, x, labels, key, mesh=None):
    """Return the loss, its gradients by parameter path and the statistics after the call."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, rest, x, labels):
        model = nnx.merge(graph, params, rest, copy=True)
        logits = jax.nn.log_softmax(model(x, key))
        nll = -jnp.mean(jnp.take_along_axis(logits, labels[:, None], 1))
        return nll, nnx.state(model, nnx.BatchStat)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    if mesh is None:
        (value, statistics), slopes = step(params, rest, x, labels)
    else:
        params, rest = (jax.device_put(part, shardings(part, mesh)) for part in (params, rest))
        batch = to_global(dict(x=x, labels=labels), mesh)
        with jax.set_mesh(mesh):
            (value, statistics), slopes = step(params, rest, **batch)
    return float(value), nnx.to_flat_state(slopes), nnx.to_flat_state(statistics)


def batch(rng, rows=8, side=9, channels=3):
    x = rng.normal(size=(rows, side, side, channels)) + np.arange(rows)[:, None, None, None]
    return np.asarray(x, np.float32), np.asarray(rng.integers(0, 10, rows), np.int32)


def same(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-4)
    for these, those in zip(one[1:], other[1:], strict=True):
        largest = max((float(jnp.linalg.norm(v.get_value())) for _, v in these), default=0.0)
        for (path, a), (_, b) in zip(these, those, strict=True):
            a, b = np.asarray(a.get_value()), np.asarray(b.get_value())
            assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(a) + 1e-5 * largest, path


@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_changes_neither_loss_nor_gradients_nor_statistics(rng, kind):
    """Rows differ in their means, so that statistics of one device's rows would be others."""
    model, (x, labels) = drawn(config(kind, **TINY)), batch(rng)
    key = jax.random.key(0)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    same(stepped(model, x, labels, key), stepped(model, x, labels, key, mesh))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fields", [dict(size="50"), dict(stem="imagenet", head="yat")], ids=str)
def test_parameters_lie_on_any_mesh(kind, fields):
    model = nnx.eval_shape(lambda: ResNet(config(kind, **fields), 3, nnx.Rngs(0)))
    for sizes in (dict(fsdp=8, data=1), dict(fsdp=2, tensor=4, data=1)):
        where = shardings(nnx.state(model), make_mesh(MeshConfig(**sizes)))
        split = [path for path, s in nnx.to_flat_state(where) if not s.is_fully_replicated and path[-1] == "kernel"]
        kernels = [path for path, _ in nnx.to_flat_state(where) if path[-1] == "kernel"]
        assert split == kernels


@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_blocks_changes_nothing(rng, kind):
    (x, labels), key = batch(rng), jax.random.key(0)
    fields = {**TINY, "stages": "1,3"}
    plain = stepped(drawn(config(kind, **fields)), x, labels, key)
    for how in (dict(remat="full"), dict(remat="names", remat_names="product,hidden", scan_layers=False)):
        same(plain, stepped(drawn(config(kind, **fields, **how)), x, labels, key))


@pytest.mark.parametrize(
    ("stages", "scan", "outside"), [("1,1", True, 2), ("3", True, 3), ("9", True, 1), ("9", False, 9)]
)
def test_what_is_computed_twice_is_kept_apart_outside_of_loops(stages, scan, outside):
    """Else XLA would merge the second computation into the first."""
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    c = config("aether_resnet", **{**TINY, "stages": stages}, remat="full", scan_layers=scan)
    graph, state = nnx.split(nnx.eval_shape(lambda: ResNet(c, 3, nnx.Rngs(0))))
    grad = jax.grad(lambda s, x: jnp.sum(nnx.merge(graph, s)(x) ** 2))
    assert jax.jit(grad).lower(state, x).as_text().count("optimization_barrier") == outside


def test_a_loop_over_blocks_is_each_block_on_its_own(rng):
    (x, labels), key = batch(rng), jax.random.key(0)
    fields = {**TINY, "stages": "9"}
    one, other = (drawn(config("resnet", **fields, scan_layers=scan)) for scan in (True, False))
    same(stepped(one, x, labels, key), stepped(other, x, labels, key))


def test_dropout_needs_a_key(rng):
    x = batch(rng)[0]
    plain, dropping = (drawn(config("aether_resnet", **TINY, dropout=rate)) for rate in (0.0, 0.5))
    np.testing.assert_array_equal(forward(plain, x)[0], forward(dropping, x)[0])
    one, other = (forward(dropping, x, jax.random.key(k))[0] for k in (0, 1))
    assert np.abs(one - other).max() > 1e-3


def stream(model, x):
    """Return rms of the stream before each block and of what the block's branch adds to it, in one array each."""
    graph, state = nnx.split(model)

    def rms(x):
        return jnp.sqrt(jnp.mean(x * x))

    def through(block, x):
        skip = x if block.skip is None else block.skip(x)
        y = block(x, True)
        return y, jnp.stack([rms(x), rms(y - skip), rms(y)])

    def run(state, x):
        model, found = nnx.merge(graph, state), []
        x = model.stem(x)
        for stage in model.stages:
            x, first = through(stage.first, x)
            one, layers = nnx.split(stage.rest)
            x, others = jax.lax.scan(lambda x, layer, one=one: through(nnx.merge(one, layer), x), x, layers)
            found += [first[None], others]
        return jnp.concatenate(found).T

    return np.asarray(jax.jit(run)(state, x))


@pytest.mark.slow
def test_a_deep_aether_starts_with_a_stream_and_gradients_of_order_one(rng):
    """ResNet-50's sixteen blocks, without normalisation: none is dead, none explodes, all kernels feel the loss.

    What a kernel feels is |gradient| |kernel|, by how much the loss changes if all of it grows by its own length.
    """
    noise = rng.normal(size=(8, 20, 20, 3))
    smooth = sum(noise[:, i : i + 16, j : j + 16] for i in range(5) for j in range(5))  # neighbours are alike
    x = np.asarray(smooth / smooth.std(), np.float32)
    model = made(config("aether_resnet", size="50", width=8, dtype="float32"))
    before, added, after = stream(model, x)
    assert (0.5 < after).all() and (after < 3.0).all()
    assert (0.04 < added / before).all() and (added / before < 0.4).all()
    value, slopes, _ = stepped(model, x, np.asarray(rng.integers(0, 10, 8), np.int32), jax.random.key(0))
    assert abs(value - math.log(10)) < 0.3
    felt = []
    values = nnx.to_flat_state(nnx.state(model, nnx.Param))
    for (path, g), (_, v) in zip(slopes, values, strict=True):
        if path[-1] == "kernel" and path[0] == "stages":
            axes = tuple(range(-4, 0))  # those of one layer, where several are stacked
            lengths = [np.sqrt(np.sum(np.square(a.get_value()), axes)).ravel() for a in (g, v)]
            felt += list(lengths[0] * lengths[1])
    assert len(felt) == 3 * 16 + 4
    assert min(felt) > 0.05 and max(felt) < 50


@pytest.mark.parametrize("spherical", [False, True])
def test_units_start_alike_whatever_their_width(rng, spherical):
    """Outputs of ⵟ convolutions are of order one in narrow stages and in wide ones."""
    model = made(config("aether_resnet", dtype="float32", width=4, stages="1,1,1,1", conv_spherical=spherical))
    levels = []
    for k, stage in enumerate(model.stages):
        graph, state = nnx.split(stage.first.hidden)
        x = np.asarray(rng.normal(size=(2, 8, 8, 4 * 2 ** max(k - 1, 0))), np.float32)
        y = jax.jit(lambda s, x, graph=graph: nnx.merge(graph, s)(x))(state, x)
        levels.append((float(y.mean()), float(y.std())))
    levels = np.array(levels)
    assert (levels > 0.2).all() and (levels < 2.0).all() and (levels.max(0) / levels.min(0) < 1.5).all()
