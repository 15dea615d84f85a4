"""Tiny configs, models, batches and texts that tests share."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params

from aether.config import Config, Pictures, build
from aether.models import describe_model, make_model

VOCAB = 32


def tiny_config(kind: str = "aether", **overrides: Any) -> Config:
    """Return a resolved config of two layers of width 16; `overrides` are sections, as in `train=dict(steps=3)`."""
    values: dict[str, dict[str, Any]] = dict(
        model=dict(kind=kind, layers=2, heads=4, width=16, dtype="float32"),
        data=dict(context=8, batch_size=8),
        optim=dict(learning_rate=1e-2, warmup_steps=2),
        train=dict(steps=60, loss_chunk=4),
    )
    for section, content in overrides.items():
        values[section] = {**values.get(section, {}), **content}
    return build(values).resolved(VOCAB)


def tiny_model(config: Config) -> nnx.Module:
    """Make the model of a resolved config from its seed, compiled as one function: much faster than op by op."""

    def make() -> nnx.Module:
        return make_model(config, nnx.Rngs(config.train.seed))

    graph = nnx.graphdef(nnx.eval_shape(make))
    return nnx.merge(graph, jax.jit(lambda: nnx.state(make()))())


def drawn_model(config: Config) -> nnx.Module:
    """Make the model of a resolved config with parameters from N(0, 1/9): nothing to compile, and no zeros."""
    rng = np.random.default_rng(config.train.seed)

    def draw(shape: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape.shape) / 3, shape.dtype)

    graph, *shapes = describe_model(config)
    return nnx.merge(graph, *jax.tree.map(draw, shapes))


def tiny_batch(config: Config, step: int = 0) -> dict[str, np.ndarray]:
    """Make a batch from a noisy cycle of ids, packed as two documents a row, with ragged masks."""
    c = config.data
    rng = np.random.default_rng([config.train.seed, step])
    columns = np.arange(c.context + 1)
    noise = rng.integers(0, 3, (c.batch_size, c.context + 1))
    tokens = (rng.integers(0, VOCAB, (c.batch_size, 1)) + 5 * columns + noise) % VOCAB
    starts = rng.integers(2, c.context, (c.batch_size, 1))
    segments = 1 + (columns >= starts)
    positions = np.where(segments == 1, columns, columns - starts)
    mask = (segments[:, 1:] == segments[:, :-1]) & (columns[1:] <= rng.integers(starts, c.context + 1))
    arrays = dict(tokens=tokens, segments=segments, positions=positions, mask=mask)
    return {k: v.astype(np.int32) for k, v in arrays.items()}


def tiny_text(folder: Path, words: int = 2000) -> Path:
    """Write a file of plain words that a model can learn something of; return its path."""
    vocabulary = "the model reads a line and says what comes next if it can".split()
    rng = np.random.default_rng(0)
    path = folder / "tiny.txt"
    lines = (" ".join(rng.choice(vocabulary, 10)) + ".\n" for _ in range(math.ceil(words / 10)))
    path.write_text("".join(lines), encoding="utf-8")
    return path


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """Yield every equation of a jaxpr, those of its inner jaxprs too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def tiny_images(folder: Path, count: int = 96, side: int = 8, classes: int = 3) -> Path:
    """Write an .npz of noisy images that are bright in a stripe of their class's own; return its path."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % classes
    images = rng.integers(0, 120, (count, side, side, 1))
    for image, label in zip(images, labels, strict=True):
        image[:, label * side // classes : (label + 1) * side // classes] += 120
    path = folder / "tiny.npz"
    np.savez(path, images=images.astype(np.uint8), labels=labels)
    return path


def tiny_run(kind: str, folder: Path) -> Config:
    """Return the config of a run of 30 steps on data that it makes in `folder`: enough to have learned something."""
    images = kind in ("aether_resnet", "resnet", "aether_vit", "vit")
    model: dict[str, Any] = dict(kind=kind, dtype="float32")
    model |= dict(stages="1,1", width=8) if kind.endswith("resnet") else dict(layers=2, heads=2, width=16)
    path = str(tiny_images(folder, 704) if images else tiny_text(folder))  # 64 of them validate
    data = dict(path=path, context=16, batch_size=8, workers=0) | ({} if images else dict(tokenizer="chars"))
    return build(
        dict(
            model=model,
            data=data,
            optim=dict(learning_rate=1e-2, warmup_steps=2),
            train=dict(steps=30, eval_every=30, sample_tokens=0),
            checkpoint=dict(every=30),
        )
    )


_TEXT_MODEL = dict(layers=2, heads=4, width=16, hidden=24, dtype="float32", vocab_multiple=16)
_IMAGE_MODEL = dict(dtype="float32")


# Each family, and each part turned at least once: what an export has to reproduce.
NETWORKS: dict[str, dict[str, Any]] = {
    "aether": dict(kind="aether", **_TEXT_MODEL),
    "aether_plain": dict(
        kind="aether", spherical=False, yat_bias=0.0, head="tied", position="learned", embed_std=0.1, **_TEXT_MODEL
    ),
    "aether_norm": dict(kind="aether", norm="layernorm", linear_bias="yes", mlp="gelu", **_TEXT_MODEL),
    "gpt2": dict(kind="gpt2", **_TEXT_MODEL),
    "gpt2_dot_yat": dict(kind="gpt2", mlp="yat", position="rotary", head="untied", **_TEXT_MODEL),
    "minibert": dict(kind="minibert", embed_std=0.1, **_TEXT_MODEL),
    "minibert_linear": dict(kind="minibert", attention="yat_linear", features=12, embed_std=0.1, **_TEXT_MODEL),
    "bert": dict(kind="bert", position="learned", head="untied", **_TEXT_MODEL),
    "aether_vit": dict(
        kind="aether_vit", layers=2, heads=4, width=16, patch=4, head="yat", pool="class", **_IMAGE_MODEL
    ),
    "vit": dict(kind="vit", layers=2, heads=4, width=16, patch=4, **_IMAGE_MODEL),
    "vit_linear": dict(
        kind="aether_vit",
        layers=2,
        heads=4,
        width=16,
        patch=4,
        attention="yat_linear",
        position="rotary",
        **_IMAGE_MODEL,
    ),
    "aether_resnet": dict(kind="aether_resnet", stages="1,2", width=8, stem="cifar", **_IMAGE_MODEL),
    "aether_resnet_deep": dict(
        kind="aether_resnet",
        size="50",
        stages="2,1",
        width=4,
        hidden=6,
        stem="imagenet",
        conv_spherical=True,
        **_IMAGE_MODEL,
    ),
    "aether_resnet_head": dict(
        kind="aether_resnet", stages="2,2", width=8, stem="stride2", head="yat", conv_bias=0.0, **_IMAGE_MODEL
    ),
    "resnet": dict(kind="resnet", stages="2,2", width=8, stem="stride2", **_IMAGE_MODEL),
    "resnet_deep": dict(
        kind="resnet", size="50", stages="1,2", width=4, hidden=5, stem="imagenet", head="yat", **_IMAGE_MODEL
    ),
}
TEXTS = [name for name, model in NETWORKS.items() if model["kind"] in ("aether", "gpt2", "minibert", "bert")]
IMAGES = [name for name in NETWORKS if name not in TEXTS]
_SIDE, _CHANNELS, _CLASSES = 16, 3, 5


def network_config(name: str) -> Config:
    """Return the resolved config of a network."""
    values = dict(model=NETWORKS[name], data=dict(context=12, batch_size=4), optim=dict(learning_rate=1e-2))
    if name in TEXTS:
        return build(values).resolved(VOCAB)
    pictures = Pictures(classes=_CLASSES, size=_SIDE, channels=_CHANNELS, mean=0.4, std=0.3)
    return build(values).resolved(_CLASSES, pictures)


def inputs_of(config: Config, rows: int = 4) -> np.ndarray:
    """Return ids (rows, 12), or images (rows, 16, 16, 3) as the network takes them."""
    rng = np.random.default_rng(7)
    if config.model.task == "classify":
        return rng.normal(size=(rows, _SIDE, _SIDE, _CHANNELS)).astype(np.float32)
    ids = config.model.vocab + (config.model.task == "mlm")
    return rng.integers(0, ids, (rows, config.data.context)).astype(np.int32)


def drawn_state(config: Config, seed: int = 0) -> tuple[nnx.GraphDef, nnx.State]:
    """Return a network's graph, and parameters and statistics from N(0, 1/9), variances above 0."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, v: nnx.Variable) -> nnx.Variable:
        value = rng.uniform(0.5, 2, v.shape) if path[-1] == "var" else rng.normal(size=v.shape) / 3
        return v.replace(jnp.asarray(value, jnp.float32))

    graph, *shapes = describe_model(config)
    flat = nnx.to_flat_state(nnx.merge_state(*shapes))
    return graph, nnx.from_flat_state([(path, draw(path, v)) for path, v in flat])
