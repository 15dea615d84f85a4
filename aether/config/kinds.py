"""The tables of networks: families with their sizes, kinds with what they decide, learning rates."""

from typing import Any

# The presets of each family, the first one its default: GPT-2's shapes (Radford et al., 2019) and `tiny`, nanoGPT's
# setting for a CPU; BERT's (Devlin et al., 2019; Turc et al., 2019); ViT's (Dosovitskiy et al., 2021; Touvron et al.,
# 2021); ResNet's (He et al., 2016).
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "gpt": {
        "tiny": dict(layers=4, heads=4, width=128),
        "124m": dict(layers=12, heads=12, width=768),
        "350m": dict(layers=24, heads=16, width=1024),
        "774m": dict(layers=36, heads=20, width=1280),
        "1.5b": dict(layers=48, heads=25, width=1600),
    },
    "bert": {
        "tiny": dict(layers=2, heads=2, width=128),
        "mini": dict(layers=4, heads=4, width=256),
        "small": dict(layers=4, heads=8, width=512),
        "medium": dict(layers=8, heads=8, width=512),
        "base": dict(layers=12, heads=12, width=768),
    },
    "vit": {
        "ti": dict(layers=12, heads=3, width=192),
        "s": dict(layers=12, heads=6, width=384),
        "b": dict(layers=12, heads=12, width=768),
    },
    "resnet": {
        "18": dict(stages="2,2,2,2", width=64),
        "34": dict(stages="3,4,6,3", width=64),
        "50": dict(stages="3,4,6,3", width=64),
        "101": dict(stages="3,4,23,3", width=64),
    },
}
BOTTLENECKS = ("50", "101")  # the ResNets of bottleneck blocks

TASKS = {"gpt": "lm", "bert": "mlm", "vit": "classify", "resnet": "classify"}
# kind -> its family, whether of ⵟ units, and what "auto" means for each part; LOG.md has the measurements behind it.
_YAT = dict(attention="yat", mlp="yat", norm="none", linear_bias="no", embed_std=1.0)
_USUAL = dict(attention="dot", mlp="gelu", norm="layernorm", linear_bias="yes", embed_std=0.02)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "aether": ("gpt", dict(_YAT, position="rotary", head="untied")),
    "gpt2": ("gpt", dict(_USUAL, position="learned", head="tied")),
    "minibert": ("bert", dict(_YAT, position="rotary", head="tied")),
    "bert": ("bert", dict(_USUAL, position="rotary", head="tied")),
    "aether_vit": ("vit", dict(_YAT, position="learned", head="linear", pool="mean")),
    "vit": ("vit", dict(_USUAL, position="learned", head="linear", pool="mean")),
    "aether_resnet": ("resnet", dict(head="linear")),
    "resnet": ("resnet", dict(head="linear")),
}
BASELINES = {"aether": "gpt2", "minibert": "bert", "aether_vit": "vit", "aether_resnet": "resnet"}
HEADS = {"gpt": ("tied", "untied"), "bert": ("tied", "untied"), "vit": ("linear", "yat"), "resnet": ("linear", "yat")}
# What a family decides by size, kind or data; it takes no other knob that could be left open.
_TRANSFORMER = ("layers", "heads", "width", "hidden", "attention", "mlp", "norm", "position", "linear_bias")
OPEN = {
    "gpt": (*_TRANSFORMER, "vocab", "head", "embed_std"),
    "bert": (*_TRANSFORMER, "vocab", "head", "embed_std"),
    "vit": (*_TRANSFORMER, "classes", "head", "embed_std", "patch", "pool"),
    "resnet": ("stages", "width", "hidden", "classes", "head", "stem"),
}

# Activations of a block that `model.remat_names` may keep.
REMAT_NAMES = ("query", "key", "value", "attention", "product", "hidden")

# Peak learning rates of the baselines: GPT-3's table (Brown et al., 2020), and for the smallest of each family a sweep
# (LOG.md); the other sizes of BERT, ViT and ResNet are carried over from it. The best rate of ⵟ networks is a multiple
# of it, measured at the smallest and carried over too.
LEARNING_RATES: dict[str, dict[str, float]] = {
    "gpt": {"tiny": 3e-3, "124m": 6e-4, "350m": 3e-4, "774m": 2.5e-4, "1.5b": 2e-4},
    "bert": {"tiny": 4e-3, "mini": 1e-3, "small": 6e-4, "medium": 6e-4, "base": 4e-4},
    "vit": {"ti": 1e-3, "s": 1e-3, "b": 6e-4},
    "resnet": {"18": 6e-3, "34": 6e-3, "50": 6e-3, "101": 4e-3},
}
RATE_FACTORS = {
    "aether": 2.0,
    "gpt2": 1.0,
    "minibert": 1.0,
    "bert": 1.0,
    "aether_vit": 2.0,
    "vit": 1.0,
    "aether_resnet": 0.5,
    "resnet": 1.0,
}

# The widths of stream and heads, and the depth, that α, b and the learning rates of ⵟ transformers are given for. In
# wider and deeper ones they follow them (`aether.models.block`, `aether.train.optim`; docs/recipe.md).
BASE_WIDTH, BASE_HEAD, BASE_LAYERS = 128, 32, 4

# Learning rates of a ⵟ transformer by group, expression over parameter paths -> factor; LOG.md has what was tried.
# Values and outputs of attention want smaller steps than the rest; points bear any, as they brake themselves.
GROUPED_RATE = 1e-2  # at optim.base_width and base_layers, of every size
GROUP_RATES = {r"attention/(value|out)/": 0.3, r"embedding$": 3.0}
RATES = {kind: "grouped" if kind in ("aether", "aether_vit") else "one" for kind in KINDS}
