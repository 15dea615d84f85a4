"""Whole networks, one file a family, each made from plain facts and a `ModelConfig`."""

from collections.abc import Callable

from flax import nnx

from aether.config import Config
from aether.models.bert import Bert
from aether.models.gpt import GPT
from aether.models.resnet import ResNet
from aether.models.vit import ViT

# family -> (resolved config, rngs) -> the network
MODELS: dict[str, Callable[[Config, nnx.Rngs], nnx.Module]] = {
    "gpt": lambda c, rngs: GPT(c.model, c.data.context, rngs),
    "bert": lambda c, rngs: Bert(c.model, c.data.context, rngs),
    "vit": lambda c, rngs: ViT(c.model, c.image.size, c.image.channels, rngs),
    "resnet": lambda c, rngs: ResNet(c.model, c.image.channels, rngs),
}


def make_model(config: Config, rngs: nnx.Rngs) -> nnx.Module:
    """Return the network of a resolved config with its initial parameters."""
    return MODELS[config.model.family](config, rngs)


def describe_model(config: Config) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Return the graph of a resolved config's network, and the shapes of what is trained and of what else it holds."""
    graph, params, *rest = nnx.split(nnx.eval_shape(lambda: make_model(config, nnx.Rngs(0))), nnx.Param, ...)
    return graph, params, rest[0]
