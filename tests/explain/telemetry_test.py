"""The numbers of each kind of ⵟ layer against float64 from the formulas, and that a loop over blocks stays one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aether.errors import InputError
from aether.explain.layers import layers_of, seen
from aether.explain.survey import silent_units
from aether.explain.telemetry import QUERIES, telemetry, told
from aether.nn import YatAttention, YatConv2D, YatLinearAttention, YatNMN
from aether.testing import drawn_state, equations, inputs_of, network_config
from tools import reference

HIDDEN = -30.0  # a stored bias or ε whose softplus is nothing


def made(name, **changes):
    """A network, of each layer with prototypes unit 1 silent, ε such that it is neither nothing nor all.

    Where there is no bias unit 2 responds a little, and unit 3 too little.
    """
    config = network_config(name)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
    model = nnx.merge(*drawn_state(config))
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, YatNMN | YatConv2D):
            layer.kernel[...] = layer.kernel[...].at[..., 1].set(0.0)
            if layer.bias is None:
                layer.kernel[...] = layer.kernel[...] * jnp.ones(layer.kernel_shape[-1]).at[2:4].set([0.06, 0.005])
            else:
                layer.bias[...] = layer.bias[...].at[..., 1].set(HIDDEN)
        if isinstance(layer, YatNMN | YatConv2D | YatAttention):
            layer.epsilon_param[...] = jnp.full_like(layer.epsilon_param[...], 1.9 if layer.spherical else 200.0)
    return model, inputs_of(config)


def exact(p):
    return np.asarray(p[...] if isinstance(p, nnx.Variable) else p, np.float64)


def softplus(p):
    return np.log1p(np.exp(exact(p)))


def apart(x, w, spherical):
    """D and |cos| of rows (n, d) and (m, d), pair by pair; a zero vector is at D = 2 from all unit vectors."""
    cos = np.abs(reference.unit(x) @ reference.unit(w).swapaxes(-1, -2))
    if spherical:
        return 2 - 2 * reference.unit(x) @ reference.unit(w).swapaxes(-1, -2), cos
    return np.sum((x[..., :, None, :] - w[..., None, :, :]) ** 2, -1), cos


def common(d, cos, epsilon, keep=True):
    keep = np.broadcast_to(keep, d.shape)
    nearest = np.sqrt(np.where(keep, d, np.inf).min(-1))
    numbers = {f"distance_{p}": np.percentile(nearest, p) for p in (5, 50, 95)}
    share = np.sum((d < epsilon) & keep) / keep.sum()
    return numbers | dict(alignment=np.where(keep, cos, 0).max(-1).mean(), epsilon_share=share)


def of_prototypes(layer, x):
    x, w = exact(x), exact(layer.kernel)
    if x.ndim == 4:
        strides = layer.strides[0]
        x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        places = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))[:, ::strides, ::strides]
        x = places.transpose(0, 1, 2, 4, 5, 3).reshape(-1, 9 * x.shape[-1])
    x, w = x.reshape(-1, x.shape[-1]), w.reshape(-1, w.shape[-1])
    epsilon, alpha = softplus(layer.epsilon_param), exact(layer.alpha)
    bias = 0.0 if layer.bias is None else softplus(layer.bias)
    d, cos = apart(x, w.T, layer.spherical)
    y = reference.yat(x, w, bias=bias, alpha=alpha, epsilon=epsilon, spherical=layer.spherical)
    square = (np.sum(w * w, 0) > 0) if layer.spherical else np.sum(w * w, 0)
    least = 2.0 * (1 - square) if layer.spherical else 0.0
    scale = np.sqrt(np.mean(y * y))
    return common(d, cos, epsilon) | dict(
        scale=scale,
        dead_share=np.mean(np.abs(y).max(0) < 1e-3 * scale),
        squared_norm=np.mean(alpha**2 * (square + bias) ** 2 / (least + epsilon)),
    )


def of_attention(layer, x, y, causal, segments=None, positions=None):
    x, t = exact(x), x.shape[1]
    heads = layer.num_heads

    def projected(linear):
        out = x @ exact(linear.kernel) + (0.0 if linear.bias is None else exact(linear.bias))
        out = out.reshape(*out.shape[:2], heads, -1)
        if layer.rope_theta is not None:
            out = reference.rotate(out, np.arange(t) if positions is None else positions, layer.rope_theta)
        return np.moveaxis(out, 2, 1)

    q, k = projected(layer.query), projected(layer.key)
    keep = np.tril(np.ones((t, t), bool)) if causal else np.ones((t, t), bool)
    if segments is not None:
        keep = keep & (segments[:, :, None] == segments[:, None, :])[:, None]
    if isinstance(layer, YatLinearAttention):
        d, cos = apart(q, k, True)
        own = dict(layer.options)
        epsilon = own["epsilon"]
        q, k = reference.unit(q), reference.unit(k)
        weights = np.where(keep, (q @ k.swapaxes(-1, -2) + own["bias"]) ** 2 / (d + epsilon), 0)
        weights = weights / weights.sum(-1, keepdims=True)
    else:
        d, cos = apart(q, k, layer.spherical)
        own = dict(bias=0.0 if layer.bias is None else softplus(layer.bias), alpha=exact(layer.alpha))
        own["epsilon"] = softplus(layer.epsilon_param)
        of = (np.moveaxis(a, 1, 2) for a in (q, k))
        weights = reference.attention_weights(
            reference.attention_scores(*of, **own, spherical=layer.spherical), np.broadcast_to(keep, d.shape)
        )
        epsilon = own["epsilon"].reshape(-1, 1, 1)
    entropy = -np.sum(weights * np.log(np.where(weights > 0, weights, 1)), -1).mean()
    return common(d, cos, epsilon, keep) | dict(entropy=entropy, scale=np.sqrt(np.mean(exact(y) ** 2)))


def check(got, wanted):
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        tolerance = 2e-3 if name == "epsilon_share" else 2e-4 * abs(value) + 1e-7  # a pair may lie on either side
        assert abs(got[name] - value) <= tolerance, (name, got[name], value)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("aether", dict(remat="full")),
        ("aether_plain", {}),
        ("minibert_linear", {}),
        ("aether_vit", dict(scan_layers=False)),
        ("aether_resnet_deep", {}),
        ("aether_resnet_head", dict(stages="9")),  # so many that the stage is a loop
    ],
)
def test_numbers_are_those_of_the_formulas(name, changes):
    model, x = made(name, **changes)
    found, layers = telemetry(model, x), seen(model, x)
    assert list(found) == list(layers)
    shares = [numbers["epsilon_share"] for numbers in found.values()]
    assert any(0.02 < share < 0.98 for share in shares)
    for key, (layer, given, gave) in layers.items():
        if isinstance(layer, YatAttention | YatLinearAttention):
            check(found[key], of_attention(layer, given, gave, causal=name in ("aether", "aether_plain")))
        else:
            check(found[key], of_prototypes(layer, given))
            silent = silent_units(model, key, [x]).units
            assert found[key]["dead_share"] == pytest.approx(len(silent) / layer.kernel_shape[-1])
            assert 1 in silent and (layer.bias is not None or (3 in silent and 2 not in silent))


def test_attention_sees_its_own_document_and_every_few_queries(rng):
    model, _ = made("aether")
    ids = jnp.asarray(rng.integers(0, 30, (2, 2 * QUERIES + 1)), jnp.int32)
    starts = np.array([[40], [77]])
    segments = (np.arange(ids.shape[1]) >= starts).astype(np.int32)
    positions = np.where(segments, np.arange(ids.shape[1]) - starts, np.arange(ids.shape[1])).astype(np.int32)
    how = dict(segments=jnp.asarray(segments), positions=jnp.asarray(positions))

    layer = layers_of(model)["blocks.0.attention"]
    x = model.gain * model.embed(ids)
    y = layer(x, is_causal=True, **how)[0]

    def run(model):
        return model(ids, **how)

    got = {k: float(v) for k, v in jax.jit(lambda: told(model, run))()["blocks.0.attention"].items()}
    everywhere = of_attention(layer, x, y, True, segments, positions)
    rows = np.linspace(0, ids.shape[1] - 1, QUERIES).round().astype(int)
    check_few(got, everywhere, layer, x, segments, positions, rows)


def check_few(got, everywhere, layer, x, segments, positions, rows):
    """The numbers of these rows alone; what all rows would give is near, and not equal."""
    q, k, _ = layer._project(x, x, jnp.asarray(positions), None)
    q, k = (np.moveaxis(exact(a), 2, 1) for a in (q, k))
    t = x.shape[1]
    keep = np.tril(np.ones((t, t), bool))[rows] & (segments[:, rows, None] == segments[:, None, :])
    d, cos = apart(q[:, :, rows], k, True)
    wanted = common(d, cos, softplus(layer.epsilon_param).reshape(-1, 1, 1), keep[:, None])
    check({name: got[name] for name in wanted}, wanted)
    for name, value in everywhere.items():
        assert abs(got[name] - value) <= 0.1 * abs(value), name


def test_a_prototype_on_its_input_is_at_its_distance():
    model, x = made("resnet_deep")
    x = x[:1]
    point = exact(seen(model, x)["head"].x[0])
    beside = point + 1e-3 * np.random.default_rng(1).normal(size=point.shape)
    model.head.kernel[...] = model.head.kernel[...].at[:, 2].set(jnp.asarray(beside, jnp.float32))
    wanted = np.linalg.norm(point - exact(model.head.kernel)[:, 2])
    assert telemetry(model, x)["head"]["distance_50"] == pytest.approx(wanted, rel=0.02)


def test_blocks_stay_a_loop_and_the_network_stays_what_it_was():
    model, x = made("aether", layers=6)
    before = nnx.state(model), YatNMN.__call__
    jaxpr = jax.make_jaxpr(lambda x: told(model, lambda model: model(x)))(jnp.asarray(x)).jaxpr
    loops = [e for e in equations(jaxpr) if e.primitive.name == "scan" and e.params["length"] == 6]
    products = sum(e.primitive.name == "dot_general" for e in equations(jaxpr))
    assert len(loops) == 1 and products < 20

    def breaks(model):
        model(jnp.asarray(x))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        told(model, breaks)
    assert YatNMN.__call__ is before[1]
    assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(before[0])


def test_a_network_without_units_is_refused():
    model = nnx.merge(*drawn_state(network_config("gpt2")))
    with pytest.raises(InputError, match="This gpt2 has no ⵟ units"):
        telemetry(model, inputs_of(network_config("gpt2")))
