"""The optimizer against NumPy: AdamW, Muon, clipping, masks and factors by path, schedules."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aether.config import ModelConfig, OptimConfig
from aether.errors import InputError
from aether.models import describe_model
from aether.testing import network_config, tiny_config
from aether.train.optim import decay_mask, learning_rate_scales, make_hold, make_optimizer, make_schedule, name

SHAPES = {
    "matrix": ((2, 4, 3), ("layers", "embed", "mlp")),
    "table": ((5, 4), ("vocab", "embed")),
    "bias": ((2, 3), ("layers", "mlp")),
}


def make_params(rng):
    return nnx.State(
        {k: nnx.Param(jnp.asarray(rng.normal(size=s), jnp.float32), axes=a) for k, (s, a) in SHAPES.items()}
    )


def named(tree):
    """Path -> value of a tree like the parameters."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {name(path): leaf for path, leaf in leaves}


def params_of(kind):
    c = tiny_config(kind)
    return describe_model(c)[1]


def sized(width, layers=4):
    return ModelConfig(kind="aether", width=width, heads=4, layers=layers).resolved(32)


def adamw(c, params, grads_of_steps, decayed, nesterov=False):
    """AdamW with clipping by the global norm, learning rate 0.01; Nesterov's looks one step ahead (Dozat, 2016)."""
    params = {k: np.asarray(v, np.float64) for k, v in params.items()}
    first, second = ({k: np.zeros(v.shape) for k, v in params.items()} for _ in range(2))
    for step, grads in enumerate(grads_of_steps, 1):
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        for k in params:
            g = grads[k] * min(1.0, c.clip / norm) if c.clip else grads[k]
            first[k] = c.beta1 * first[k] + (1 - c.beta1) * g
            second[k] = c.beta2 * second[k] + (1 - c.beta2) * g**2
            mean = first[k] / (1 - c.beta1**step)
            if nesterov:
                mean = c.beta1 * first[k] / (1 - c.beta1 ** (step + 1)) + (1 - c.beta1) * g / (1 - c.beta1**step)
            move = mean / (np.sqrt(second[k] / (1 - c.beta2**step)) + c.eps)
            params[k] = params[k] - 0.01 * (move + (c.weight_decay * params[k] if k in decayed else 0.0))
    return params


def run(c, params, grads_of_steps, shapes=SHAPES):
    optimizer = make_optimizer(c)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(lambda p, u: p + 0.01 * u, params, updates), state

    for grads in grads_of_steps:
        grads = nnx.State({k: nnx.Param(jnp.asarray(g, jnp.float32), axes=shapes[k][1]) for k, g in grads.items()})
        params, state = step(params, state, grads)
    return {k: np.asarray(v, np.float64) for k, v in named(params).items()}


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_adamw_is_adamw(rng, clip):
    c = OptimConfig(clip=clip, weight_decay=0.3, eps=1e-3)
    params = make_params(rng)
    grads = [{k: scale * rng.normal(size=s) for k, (s, _) in SHAPES.items()} for scale in (1.0, 5.0, 0.01, 1.0)]
    want = adamw(c, named(params), grads, {"matrix", "table"})
    for k, value in run(c, params, grads).items():
        np.testing.assert_allclose(value, want[k], atol=2e-6, err_msg=k)


def test_muon_makes_each_matrix_of_a_stack_nearly_orthogonal_and_leaves_the_rest_to_adam(rng):
    c = OptimConfig(name="muon", no_muon="", clip=0.0, weight_decay=0.0)
    params, grads = make_params(rng), [{k: rng.normal(size=s) for k, (s, _) in SHAPES.items()} for _ in range(2)]
    grads[0]["matrix"][1] *= 1e3  # one layer's scale must not touch the other's
    before, got = named(params), run(c, params, grads[:1])
    step = (got["matrix"] - np.asarray(before["matrix"])) / 0.01
    for move, g in zip(step, grads[0]["matrix"], strict=True):
        u, _, v = np.linalg.svd(g, full_matrices=False)
        size = 0.2 * math.sqrt(4)  # an orthogonal matrix, scaled to Adam's root mean square
        np.testing.assert_allclose(np.linalg.svd(move)[1], size, rtol=0.35)
        assert np.sum(move * (u @ v)) / np.linalg.norm(move) / np.sqrt(3) < -0.95
    adam = adamw(OptimConfig(clip=0.0), before, grads[:1], set(), nesterov=True)  # optax's muon brings this one
    for k in ("table", "bias"):
        np.testing.assert_allclose(got[k], adam[k], atol=2e-6, err_msg=k)


def test_muon_leaves_to_adam_what_it_is_told_to(rng):
    params, grads = make_params(rng), [{k: rng.normal(size=s) for k, (s, _) in SHAPES.items()} for _ in range(2)]
    c = OptimConfig(name="muon", no_muon="^mat", weight_decay=0.3, eps=1e-3)
    want = adamw(c, named(params), grads, {"matrix", "table"}, nesterov=True)
    for k, value in run(c, params, grads).items():
        np.testing.assert_allclose(value, want[k], atol=2e-6, err_msg=k)


def test_muon_leaves_points_to_adam_by_default():
    found = {}
    for kind in ("aether", "gpt2"):
        c = tiny_config(kind, optim=dict(name="muon")).resolved(32).optim
        momenta = make_optimizer(c).init(params_of(kind))
        kept = jax.tree_util.tree_flatten_with_path(momenta)[0]
        found[kind] = {
            name(path).split("blocks/")[-1] for path, _ in kept if "muon" in name(path) and "blocks" in name(path)
        }
    maps = {"attention/value/kernel", "attention/out/kernel", "mlp/out/kernel"}
    assert found["aether"] == maps
    assert found["gpt2"] == maps | {"attention/query/kernel", "attention/key/kernel", "mlp/hidden/kernel"}


def test_muon_takes_the_kernels_of_convolutions_as_matrices(rng):
    """From patches to features, each layer of a stack apart; not the stem's, whose channels are those of the images."""
    shapes = {
        "first": ((3, 3, 2, 4), (None, None, "embed", "mlp")),
        "rest": ((2, 3, 3, 2, 4), ("layers", None, None, "embed", "mlp")),
        "stem": ((3, 3, 1, 4), (None, None, None, "embed")),
    }
    params = nnx.State(
        {k: nnx.Param(jnp.asarray(rng.normal(size=s), jnp.float32), axes=a) for k, (s, a) in shapes.items()}
    )
    before = named(params)
    grads = [{k: rng.normal(size=s) for k, (s, _) in shapes.items()}]
    got = run(OptimConfig(name="muon", no_muon="", clip=0.0, weight_decay=0.0), params, grads, shapes)
    moves = {k: (np.asarray(got[k]) - np.asarray(before[k])) / 0.01 for k in shapes}
    for move in (moves["first"], *moves["rest"]):
        values = np.linalg.svd(move.reshape(18, 4))[1]
        np.testing.assert_allclose(values, values.mean(), rtol=0.35)
    np.testing.assert_allclose(np.abs(moves["stem"]), 1.4737, rtol=1e-3)  # the first step of Adam, by its sign alone


def test_columns_keep_their_norms_where_they_are_held(rng):
    shapes = SHAPES | {"window": ((3, 3, 2, 4), (None, None, "embed", "mlp"))}
    old, new = (
        nnx.State({k: nnx.Param(jnp.asarray(rng.normal(size=s), jnp.float32), axes=a) for k, (s, a) in shapes.items()})
        for _ in range(2)
    )
    got = named(jax.jit(make_hold(OptimConfig(hold_norm="matrix|window|bias"), old))(new, old))
    old, new = ({k: np.asarray(v, np.float64) for k, v in named(x).items()} for x in (old, new))
    for k, over in {"matrix": (1,), "window": (0, 1, 2)}.items():
        ratio = np.sqrt((old[k] ** 2).sum(over, keepdims=True) / (new[k] ** 2).sum(over, keepdims=True))
        np.testing.assert_allclose(got[k], new[k] * ratio, rtol=1e-5)
    for k in ("table", "bias"):  # not found, and no matrix
        np.testing.assert_array_equal(got[k], new[k])


def test_decay_is_for_matrices_by_path():
    masks = named(decay_mask(OptimConfig(), params_of("gpt2")))
    assert {k for k, on in masks.items() if on} == {
        "embed/embedding",
        "position/embedding",
        *(f"blocks/attention/{k}/kernel" for k in ("query", "key", "value", "out")),
        *(f"blocks/mlp/{k}/kernel" for k in ("hidden", "out")),
    }
    masks = named(decay_mask(OptimConfig(no_decay="embed|head"), params_of("aether")))
    assert not masks["embed/embedding"] and not masks["head/kernel"] and masks["blocks/mlp/out/kernel"]
    assert not masks["blocks/attention/alpha"] and not masks["blocks/mlp/hidden/bias"]  # vectors never
    assert any(named(decay_mask(OptimConfig(no_decay=""), params_of("aether"))).values())


def test_learning_rates_by_path_the_first_match_counts():
    c = OptimConfig(lr_scale={"embed": 0.5, "embedding|head": 0.1, "alpha": 3.0})
    scales = named(learning_rate_scales(c, params_of("aether"), sized(16)))
    assert (scales["embed/embedding"], scales["head/kernel"]) == (0.5, 0.1)
    assert scales["blocks/attention/alpha"] == scales["blocks/mlp/hidden/alpha"] == 3.0
    assert scales["blocks/mlp/out/kernel"] == 1.0


def test_grouped_rates_are_by_group_and_width():
    """Points keep the learning rate, linear maps of attention and tables have their own, wide kernels less."""
    c = OptimConfig(rates="grouped", base_width=128, base_layers=4)
    narrow, wide = (named(learning_rate_scales(c, params_of("aether"), sized(width))) for width in (128, 512))
    attention = dict(query=1.0, key=1.0, value=0.3, out=0.3)
    wanted = {f"blocks/attention/{k}/kernel": v for k, v in attention.items()}
    wanted |= {"blocks/mlp/hidden/kernel": 1.0, "blocks/mlp/out/kernel": 1.0, "head/kernel": 1.0}
    kept = {f"blocks/{k}": 1.0 for k in ("attention/alpha", "attention/bias", "attention/epsilon_param")}
    kept |= {f"blocks/mlp/hidden/{k}": 1.0 for k in ("alpha", "bias", "epsilon_param")} | {"embed/embedding": 3.0}
    assert narrow == wanted | kept
    kept |= {"blocks/attention/alpha": 4**1.5, "blocks/mlp/hidden/alpha": 4.0}  # as they themselves are
    assert wide == {k: v / 4 for k, v in wanted.items()} | kept
    assert named(learning_rate_scales(c, params_of("aether"), sized(16))) == narrow, "narrower ones were not measured"
    own = OptimConfig(rates="grouped", base_layers=4, lr_scale={"out": 10.0})
    assert (
        named(learning_rate_scales(own, params_of("aether"), sized(256)))["blocks/attention/out/kernel"] == 10 * 0.3 / 2
    )
    assert set(named(learning_rate_scales(OptimConfig(rates="one"), params_of("aether"), sized(512))).values()) == {1.0}


def test_grouped_rates_of_blocks_fall_with_the_root_of_the_depth():
    """Those of kernels in deeper networks; table, head and what is no matrix keep theirs."""
    c, params = OptimConfig(rates="grouped", base_layers=4), params_of("aether")
    base, deep = (named(learning_rate_scales(c, params, sized(128, layers))) for layers in (4, 16))
    inside = {k for k in base if k.startswith("blocks/") and k.endswith("kernel")}
    assert len(inside) == 6
    assert deep == {k: v / 2 if k in inside else v for k, v in base.items()}
    assert named(learning_rate_scales(c, params, sized(128, 2))) == base, "shallower ones were not measured"
    elsewhere = OptimConfig(rates="grouped", base_layers=16)
    assert named(learning_rate_scales(elsewhere, params, sized(128, 16))) == base
    own = OptimConfig(rates="grouped", base_layers=4, lr_scale={"out": 10.0})
    both = named(learning_rate_scales(own, params, sized(512, 16)))
    assert both["blocks/attention/out/kernel"] == pytest.approx(10 * 0.3 / 4 / 2)
    assert both["head/kernel"] == pytest.approx(1 / 4)


def test_patches_keep_their_rate_in_wide_and_deep_networks():
    """They have as many inputs at every width and are in no block; the head has more."""
    c = ModelConfig(kind="aether_vit", width=512, heads=4, layers=16, classes=10, patch=4).resolved(10, 8)
    params = describe_model(network_config("aether_vit"))[1]
    scales = named(learning_rate_scales(OptimConfig(rates="grouped", base_layers=4), params, c))
    assert (scales["patches/kernel"], scales["head/kernel"], scales["position/embedding"]) == (1.0, 1 / 4, 3.0)
    assert scales["blocks/mlp/out/kernel"] == 1 / 8


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (dict(lr_scale={"nothing": 2.0}), "optim.lr_scale has 'nothing'.*no parameter path.*blocks/mlp/out/kernel"),
        (dict(lr_scale={"(": 2.0}), r"optim.lr_scale has '\('.*not a regular expression"),
        (dict(no_decay="["), r"optim.no_decay has '\['.*not a regular expression"),
        (
            dict(hold_norm="bias"),
            "optim.hold_norm is 'bias', found in no matrix's path; there are .*blocks/mlp/out/kernel, embed",
        ),
        (dict(no_muon="["), r"optim.no_muon has '\['.*not a regular expression"),
    ],
)
def test_expressions_that_cannot_mean_anything_are_refused(knobs, message):
    with pytest.raises(InputError, match=message):
        learning_rate_scales(OptimConfig(**knobs), params_of("aether"), sized(16))
        make_hold(OptimConfig(**knobs), params_of("aether"))


COSINE_MIDDLE = 0.1 + 0.9 * 0.5


@pytest.mark.parametrize(
    ("shape", "points"),
    [
        ("cosine", {1: 0.1, 5: 0.5, 10: 1.0, 60: COSINE_MIDDLE, 110: 0.1, 111: 0.1, 500: 0.1}),
        ("linear", {1: 0.1, 10: 1.0, 60: 0.55, 110: 0.1, 500: 0.1}),
        ("constant", {1: 0.1, 10: 1.0, 60: 1.0, 110: 1.0, 500: 1.0}),
        ("wsd", {1: 0.1, 10: 1.0, 60: 1.0, 88: 1.0, 99: 0.55, 110: 0.1, 500: 0.1}),
    ],
)
def test_schedules_at_named_points(shape, points):
    """100 steps after 10 of warm-up; wsd falls in the last 22."""
    c = OptimConfig(learning_rate=2e-3, schedule=shape, warmup_steps=10, schedule_steps=110)
    schedule = make_schedule(c)
    for step, share in points.items():
        assert float(schedule(step)) == pytest.approx(2e-3 * share, rel=1e-5), step


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_may_be_longer_than_the_schedule_or_absent(shape):
    long = make_schedule(OptimConfig(learning_rate=1.0, schedule=shape, warmup_steps=50, schedule_steps=20))
    assert float(long(20)) == pytest.approx(0.4) and float(long(50)) == pytest.approx(1.0)
    assert math.isfinite(float(long(100)))
    none = make_schedule(OptimConfig(learning_rate=1.0, schedule=shape, warmup_steps=0, schedule_steps=20))
    assert 0.9 <= float(none(1)) <= 1.0
    assert float(none(20)) == pytest.approx(1.0 if shape == "constant" else 0.1)


def test_wsd_may_decay_over_the_whole_schedule():
    schedule = make_schedule(
        OptimConfig(learning_rate=1.0, schedule="wsd", decay_fraction=1.0, warmup_steps=10, schedule_steps=110)
    )
    assert float(schedule(10)) == 1.0 and float(schedule(60)) == pytest.approx(0.55)
