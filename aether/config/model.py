"""The network: the knobs of its parts, and what its kind and size decide."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

from aether.config.kinds import BASE_HEAD, BASE_WIDTH, BOTTLENECKS, HEADS, KINDS, OPEN, REMAT_NAMES, SIZES, TASKS
from aether.config.section import AUTO, Section, knob
from aether.errors import InputError


@dataclass(frozen=True)
class ModelConfig(Section, prefix="model"):
    """The network: each part turns from ⵟ to the baseline's by its own field, or all of them by `kind`."""

    kind: str = knob(
        "aether",
        "a network of ⵟ units without normalisation, or its baseline: of text aether, gpt2, to fill in masked text "
        "minibert, bert, to classify images aether_resnet, resnet and aether_vit, vit",
        choices=tuple(KINDS),
    )
    size: str = knob(AUTO, "preset of layers, heads and width (auto: the family's first)", auto=True)
    layers: int = knob(0, "blocks of a transformer (0: by size)", low=0, auto=True)
    heads: int = knob(0, "attention heads (0: by size)", low=0, auto=True)
    width: int = knob(
        0, "width of the residual stream, in a ResNet that of the first stage (0: by size)", low=0, auto=True
    )
    stages: str = knob(AUTO, "blocks of each stage of a ResNet, as in 2,2,2 (auto: by size)", auto=True)
    hidden: int = knob(
        0,
        "hidden units of the MLP (0: 4 x width), in a ResNet of a block of the first stage, doubled from stage to "
        "stage (0: width)",
        low=0,
        auto=True,
    )
    vocab: int = knob(0, "ids that may be predicted (0: the tokenizer's)", low=0, auto=True)
    classes: int = knob(0, "classes of images (0: the data's)", low=0, auto=True)
    attention: str = knob(
        AUTO,
        "score of query and key; yat_linear, in time linear in the length, for minibert and aether_vit",
        choices=(AUTO, "yat", "dot", "yat_linear"),
        auto=True,
    )
    features: int = knob(0, "features of each head of yat_linear (0: 4 x the head's width)", low=0)
    mlp: str = knob(AUTO, "hidden unit", choices=(AUTO, "yat", "gelu"), auto=True)
    norm: str = knob(AUTO, "normalisation before each branch", choices=(AUTO, "none", "layernorm"), auto=True)
    position: str = knob(AUTO, "position by rotation or by a table", choices=(AUTO, "rotary", "learned"), auto=True)
    head: str = knob(
        AUTO,
        "output matrix: the embedding's or its own; of classifiers linear or ⵟ",
        choices=(AUTO, *dict.fromkeys(head for heads in HEADS.values() for head in heads)),
        auto=True,
    )
    stem: str = knob(
        AUTO,
        "first layer of a ResNet: 7x7/2 and a pool, 3x3, or 3x3/2 (auto: imagenet from 128 pixels on, else cifar)",
        choices=(AUTO, "imagenet", "cifar", "stride2"),
        auto=True,
    )
    patch: int = knob(
        0, "side of a ViT's patches (0: the largest up to 16 that leaves 7 or more a side)", low=0, auto=True
    )
    pool: str = knob(
        AUTO, "what a ViT's head sees: a class token, or the mean", choices=(AUTO, "class", "mean"), auto=True
    )
    linear_bias: str = knob(AUTO, "biases in linear maps", choices=(AUTO, "yes", "no"), auto=True)
    attention_impl: str = knob(
        "auto",
        "whole score matrices, blocks of them in linear memory, or a kernel of the platform (auto: the best there is)",
        choices=(AUTO, "plain", "blockwise", "flash"),
        free=True,
    )
    rope_theta: float = knob(10000.0, "base of the rotary wavelengths", low=1.0)
    spherical: bool = knob(True, "ⵟ on unit vectors x/|x|, w/|w|; in a transformer")
    epsilon: float = knob(0.3, "initial ε of the ⵟ denominator (learned); in a transformer", low=1e-6)
    attention_alpha: float = knob(
        8.0,
        "initial α of attention scores (learned per head), in heads of up to 32; × (width / 32)^1.5 in wider ones",
        low=0.0,
    )
    mlp_alpha: float = knob(
        16.0,
        "initial α of hidden units (learned per layer), in networks up to 128 wide; × width / 128 in wider ones",
        low=0.0,
    )
    yat_bias: float = knob(
        0.1,
        "initial b = softplus(bias) of a transformer's ⵟ units (learned; 0: no bias), × the root of 128 / width, in "
        "scores 32 / width, where wider",
        low=0.0,
    )
    conv_spherical: bool = knob(False, "the same four of a ResNet's ⵟ convolutions: on unit vectors")
    conv_epsilon: float = knob(1.0, "initial ε", low=1e-6)
    conv_alpha: float = knob(1.0, "initial α, in units that make the output of order one", low=0.0)
    conv_bias: float = knob(0.25, "initial b", low=0.0)
    embed_std: float = knob(
        0.0, "initial standard deviation of embeddings (0: 1 for ⵟ networks, 0.02 for baselines)", low=0.0, auto=True
    )
    dropout: float = knob(
        0.0, "dropout on embeddings and on the output of each branch; in a ResNet before the head", low=0.0, high=0.9
    )
    dtype: str = knob("bfloat16", "compute dtype (parameters stay float32)", choices=("bfloat16", "float32"))
    remat: str = knob(
        "none",
        "what blocks keep for the backward pass: all, their matrix products, nothing but their input, that in the "
        "host's memory, or what model.remat_names says",
        choices=("none", "dots", "full", "offload", "names"),
        free=True,
    )
    remat_names: str = knob(
        "", "with model.remat=names: what to keep, of query, key, value, attention, product, hidden", free=True
    )
    scan_layers: bool = knob(True, "compile one block and loop over it, or each block on its own", free=True)
    vocab_multiple: int = knob(128, "embedding and head have rows for a multiple of this, the last ones unused", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.kept_names() if name not in REMAT_NAMES]
        if unknown or (self.remat == "names") != bool(self.kept_names()):
            raise InputError(
                f"model.remat is {self.remat} and model.remat_names {self.remat_names!r}; with model.remat=names it "
                f"takes some of {', '.join(REMAT_NAMES)}, and otherwise nothing."
            )

    def kept_names(self) -> list[str]:
        """Return the activations that `remat_names` names."""
        return [name.strip() for name in self.remat_names.split(",") if name.strip()]

    @property
    def family(self) -> str:
        """The architecture: gpt, bert, vit or resnet."""
        return KINDS[self.kind][0]

    @property
    def task(self) -> str:
        """What is learned, a key of `aether.losses.LOSSES`: lm, mlm or classify."""
        return TASKS[self.family]

    @property
    def prototypes(self) -> bool:
        """Whether a resolved network has ⵟ units with weights of their own, as attention has none."""
        return self.kind == "aether_resnet" or "yat" in (self.mlp, self.head)

    @property
    def has_units(self) -> bool:
        """Whether a resolved network has ⵟ units at all, attention's too."""
        return self.prototypes or self.attention in ("yat", "yat_linear")

    @property
    def points(self) -> str:
        """A regular expression for the paths of a resolved transformer's kernels that are points more than maps."""
        hidden, scores = self.mlp == "yat", self.attention in ("yat", "yat_linear")
        return "|".join(hidden * [r"mlp/hidden/kernel"] + scores * [r"attention/(query|key)/kernel"])

    @property
    def times_wider(self) -> tuple[float, float]:
        """How many times wider than the recipe's a transformer's stream and heads are; 1 where they are not.

        The recipe is of spherical units, and plain ones follow no rule of width.
        """
        if not self.spherical:
            return 1.0, 1.0
        return max(1.0, self.width / BASE_WIDTH), max(1.0, self.width / self.heads / BASE_HEAD)

    @property
    def rows(self) -> int:
        """Rows of the embedding: the ids, and of a masked language model the mask, padded by `vocab_multiple`."""
        ids = self.vocab + (self.task == "mlm")
        return -(-ids // self.vocab_multiple) * self.vocab_multiple

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks of each stage of a ResNet."""
        return tuple(int(n) for n in self.stages.split(","))

    def units(self, stage: int) -> int:
        """Return the hidden units of each block of a ResNet's stage."""
        return (self.hidden or self.width) * 2**stage

    @property
    def bottleneck(self) -> bool:
        """Whether a ResNet's blocks are 1x1, 3x3, 1x1 convolutions and not two of 3x3."""
        return self.size in BOTTLENECKS

    def resolved(self, outputs: int, image_size: int = 0) -> Self:
        """Decide what `kind` and `size` leave open.

        Args:
          outputs: the tokenizer's ids, or the classes; 0 if not known yet.
          image_size: pixels a side; 0 if not known yet, or for text.
        """
        family, parts = KINDS[self.kind]
        sizes = SIZES[family]
        size = next(iter(sizes)) if self.size == AUTO else self.size
        if size not in sizes:
            raise InputError(f"model.size is {size!r} and model.kind {self.kind}; it takes one of {', '.join(sizes)}.")
        counted = "classes" if self.task == "classify" else "vocab"
        decided: dict[str, Any] = {**sizes[size], **parts, counted: outputs}
        decided |= {"stem": _stem(image_size), "patch": _patch(image_size)} if self.task == "classify" else {}
        new = {k: v if getattr(self, k) in (0, AUTO) else getattr(self, k) for k, v in decided.items()}
        new["hidden"] = self.hidden or new["width"] * (1 if family == "resnet" else 4)
        self._check_open(family)
        new = {k: v for k, v in new.items() if k in OPEN[family]} | {"size": size}
        if new[counted] < outputs:
            have = f"data have {outputs} classes" if counted == "classes" else f"tokenizer has {outputs} ids"
            raise InputError(f"model.{counted} is {new[counted]} but the {have}; set it to 0 or at least {outputs}.")
        done = dataclasses.replace(self, **new)
        (done._check_stages if family == "resnet" else done._check_heads)()
        if family == "vit" and image_size and image_size % done.patch:
            fitting = ", ".join(str(n) for n in range(1, image_size + 1) if image_size % n == 0)
            raise InputError(
                f"model.patch is {done.patch}, which does not divide the {image_size} pixels of the images' sides; "
                f"{fitting} would, or set image.size."
            )
        return done

    def _check_open(self, family: str) -> None:
        """Refuse a setting of a part that the family does not have."""
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.metadata["auto"] and f.name not in (*OPEN[family], "size") and value not in (0, AUTO):
                raise InputError(
                    f"model.{f.name} is {value!r}, but {self.kind} has no such part; set it to {f.default!r}, or "
                    "choose another model.kind."
                )
        if self.head not in (AUTO, *HEADS[family]):
            raise InputError(
                f"model.head is {self.head} and model.kind {self.kind}; it takes one of {', '.join(HEADS[family])}."
            )
        if self.features and self.attention != "yat_linear":
            raise InputError(
                f"model.features is {self.features}, which model.attention=yat_linear alone has; set it to 0."
            )
        if self.attention == "yat_linear" and family == "gpt":
            raise InputError("model.attention is yat_linear, which is for minibert and aether_vit; take yat or dot.")

    def _check_heads(self) -> None:
        width, heads = self.width, self.heads
        if width % heads:
            raise InputError(f"model.width is {width} and model.heads {heads}; make the width a multiple of the heads.")
        if self.position == "rotary" and width // heads % 2:
            raise InputError(f"model.width / model.heads is {width // heads}; rotary positions need it to be even.")

    def _check_stages(self) -> None:
        parts = self.stages.split(",")
        if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            raise InputError(
                f"model.stages is {self.stages!r}; write the blocks of each stage, whole numbers above 0, as in 2,2,2."
            )


def _stem(image_size: int) -> str:
    return "imagenet" if image_size >= 128 else "cifar"


def _patch(image_size: int) -> int:
    fitting = [n for n in range(1, 17) if image_size and image_size % n == 0 and image_size // n >= 7]
    return max(fitting, default=1)
