import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from aether.config import Pictures, build
from aether.explain.propagation import propagation
from aether.losses import loss_of
from aether.models import make_model

TEXT = dict(model=dict(layers=3, width=16, heads=2, dtype="float32", attention_impl="plain"), data=dict(context=8))
IMAGE = dict(model=dict(width=8, stages="2,1", dtype="float32"))
PICTURES = Pictures(classes=3, size=8, channels=1, mean=0.5, std=0.25)


def made(kind: str, **model) -> tuple:
    """Return a config, its network, and a batch."""
    rng = np.random.default_rng(1)
    images = "resnet" in kind or "vit" in kind
    values = {k: dict(v) for k, v in (IMAGE if "resnet" in kind else TEXT).items()}
    values["model"] |= dict(kind=kind, **model)
    if images:
        values.pop("data", None)
        config = build(values).resolved(pictures=PICTURES)
        shape = (4, 8, 8, 1)
        batch = dict(images=rng.integers(0, 256, shape).astype(np.uint8), labels=np.arange(4) % 3, mask=np.ones(4))
    else:
        config = build(values).resolved(vocab=11)
        t = 8 if "bert" in kind else 9
        tokens = rng.integers(0, 11, (4, t)).astype(np.int32)
        places = np.broadcast_to(np.arange(t, dtype=np.int32), (4, t))
        batch = dict(tokens=tokens, segments=np.ones((4, t), np.int32), positions=places, mask=np.ones((4, 8)))
        batch |= dict(targets=tokens) if "bert" in kind else {}
    return config, make_model(config, nnx.Rngs(0)), batch


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


@pytest.mark.parametrize("kind", ["aether", "gpt2"])
def test_against_blocks_run_one_by_one(kind):
    """The loop over blocks written out, and the gradient of what comes after each."""
    config, model, batch = made(kind)
    found = propagation(model, loss_of(config), batch)
    tokens, positions = jnp.asarray(batch["tokens"][:, :-1]), jnp.asarray(batch["positions"][:, :-1])
    graph, state = nnx.split(model.blocks)
    blocks = [nnx.merge(graph, jax.tree.map(lambda a, k=k: a[k], state)) for k in range(3)]

    def rest(x, first):
        for block in blocks[first:]:
            x, _ = block(x, positions, None, None, None)
        hidden = x if model.norm is None else model.norm(x)
        log_p = jax.nn.log_softmax(model.logits(hidden))
        return -jnp.sum(jnp.take_along_axis(log_p, jnp.asarray(batch["tokens"])[:, 1:, None], -1))

    x = model.gain * model.embed(tokens)
    x = x if model.position is None else x + model.position(positions)
    for k, block in enumerate(blocks):
        one = found.blocks[f"blocks.{k}"]
        inner = block.norm1(x) if block.norm1 else x
        attended, _ = block.attention(inner, is_causal=True, positions=positions)
        y, _ = block(x, positions, None, None, None)
        wanted = dict(stream=rms(x), attention=rms(attended), mlp=rms(y - x - attended), added=rms(y - x))
        wanted["gradient"] = rms(jax.grad(rest)(y, k + 1))
        weights = np.asarray(block.attention.weights(inner, jnp.arange(1, 8), is_causal=True)[0], np.float64)
        if config.model.position == "learned":
            entropy = -(weights * np.log(np.where(weights > 0, weights, 1))).sum(-1) / np.log(np.arange(2, 9))
            wanted["entropy"] = entropy.mean()
        for name, value in wanted.items():
            np.testing.assert_allclose(one[name], value, rtol=2e-4, err_msg=f"{k} {name}")
        assert 0 < one["entropy"] <= 1 + 1e-6
        x = y
    np.testing.assert_allclose(found.loss, rest(x, 3) / 32, rtol=1e-5)


@pytest.mark.parametrize("kind", ["aether", "gpt2", "minibert", "aether_vit", "vit", "aether_resnet", "resnet"])
def test_every_kind(kind):
    config, model, batch = made(kind)
    before = jax.tree.map(np.asarray, nnx.state(model))
    loss = loss_of(config)
    found = propagation(model, loss, batch)
    resnet = "resnet" in kind
    names = ["stages.0.0", "stages.0.1", "stages.1.0"] if resnet else [f"blocks.{k}" for k in range(3)]
    assert list(found.blocks) == names
    keys = {"stream", "gradient", "added"} | (set() if resnet else {"attention", "mlp", "entropy"})
    for name, one in found.blocks.items():
        assert set(one) == keys - ({"added"} if name == "stages.1.0" else set()), name
        assert all(np.isfinite(v) and (v > 0 or key == "added") for key, v in one.items()), one
        assert "added" not in one or (one["added"] > 0) != (kind == "resnet"), "whose blocks begin as identities"
    graph, params, extras = nnx.split(model, nnx.Param, ...)
    grads = jax.grad(lambda p: loss(nnx.merge(graph, p, extras, copy=True), batch, None)[0])(params)
    flat = {"/".join(map(str, path)): v for path, v in nnx.to_flat_state(grads)}
    assert set(flat) == set(found.parameters)
    for path, numbers in found.parameters.items():
        layers = flat[path].shape[:1] if flat[path].get_metadata()["axes"][0] == "layers" else ()
        assert numbers["value"].shape == numbers["gradient"].shape == layers
        np.testing.assert_allclose(
            np.sqrt(np.mean(np.square(numbers["gradient"]))), rms(flat[path][...]), rtol=1e-3, atol=1e-6, err_msg=path
        )
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, nnx.state(model)))


def test_linear_attention_has_no_entropy():
    config, model, batch = made("minibert", attention="yat_linear")
    found = propagation(model, loss_of(config), batch).blocks["blocks.2"]
    assert set(found) == {"stream", "gradient", "added", "attention", "mlp"}


def test_uniform_weights_have_entropy_one():
    config, model, batch = made("gpt2", position="learned")
    for name in ("query", "key"):
        kernel = getattr(model.blocks.attention, name).kernel
        kernel.set_value(jnp.zeros_like(kernel[...]))
    found = propagation(model, loss_of(config), batch)
    np.testing.assert_allclose([one["entropy"] for one in found.blocks.values()], 1.0, rtol=1e-5)
