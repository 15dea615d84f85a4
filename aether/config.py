"""The schema: every knob with its default, its check and its help, in one place.

A config travels as `ConfigDict` (a file's `get_config()`, edited by flags) -> `build()` -> `Config`, frozen and
checked. `Config.resolved(vocab)` then decides what was left at 0 or "auto". Nothing here imports JAX.
"""

import dataclasses
import difflib
import json
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from ml_collections import ConfigDict

from aether.errors import InputError

AUTO = "auto"

# GPT-2's shapes (Radford et al., 2019), and `tiny`, nanoGPT's setting for a CPU.
SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(layers=4, heads=4, width=128),
    "124m": dict(layers=12, heads=12, width=768),
    "350m": dict(layers=24, heads=16, width=1024),
    "774m": dict(layers=36, heads=20, width=1280),
    "1.5b": dict(layers=48, heads=25, width=1600),
}

# What `model.kind` decides; LOG.md has the measurements behind the Aether row.
KINDS: dict[str, dict[str, Any]] = {
    "aether": dict(
        attention="yat", mlp="yat", norm="none", position="rotary", head="untied", linear_bias="no", embed_std=1.0
    ),
    "gpt2": dict(
        attention="dot",
        mlp="gelu",
        norm="layernorm",
        position="learned",
        head="tied",
        linear_bias="yes",
        embed_std=0.02,
    ),
}

# Activations of a block that `model.remat_names` may keep.
REMAT_NAMES = ("query", "key", "value", "attention", "product", "hidden")

# Peak learning rates of the baseline: GPT-3's table (Brown et al., 2020), and a sweep for `tiny` (LOG.md).
# AetherGPT's best rate is a multiple of it: measured at `tiny`, carried over to the other sizes.
LEARNING_RATES = {"tiny": 3e-3, "124m": 6e-4, "350m": 3e-4, "774m": 2.5e-4, "1.5b": 2e-4}
RATE_FACTORS = {"aether": 2.0, "gpt2": 1.0}


def knob(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    auto: bool = False,
    free: bool = False,
) -> Any:
    """Describe a field: inclusive bounds; `auto`: 0 or "auto" is decided later; `free`: may change on resume."""
    metadata = dict(doc=doc, low=low, high=high, choices=choices, auto=auto, free=free)
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Section:
    """A group of knobs under one dotted prefix, each checked as it is made."""

    prefix: typing.ClassVar[str]

    def __init_subclass__(cls, prefix: str) -> None:
        cls.prefix = prefix

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value = _checked(f"{self.prefix}.{f.name}", getattr(self, f.name), f)
            object.__setattr__(self, f.name, value)


def _checked(key: str, value: Any, f: dataclasses.Field) -> Any:
    """Return `value` if it has the type, range and choices of field `f`; raise `InputError` if not."""
    kind: Any = typing.get_origin(f.type) or f.type
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise InputError(f"{key} is {value!r} ({type(value).__name__}); it takes a value of type {kind.__name__}.")
    if kind is dict:
        item = typing.get_args(f.type)[1]
        for name, v in value.items():
            if type(v) is not item and not (item is float and type(v) is int):
                raise InputError(
                    f"{key}.{name} is {v!r} ({type(v).__name__}); it takes a value of type {item.__name__}."
                )
        return {name: item(v) for name, v in value.items()}
    low, high, choices = f.metadata["low"], f.metadata["high"], f.metadata["choices"]
    if kind in (int, float):
        if not math.isfinite(value):
            raise InputError(f"{key} is {value}; it takes a finite number.")
        if (low is not None and value < low) or (high is not None and value > high):
            span = f"at least {low}" if high is None else f"at most {high}" if low is None else f"from {low} to {high}"
            raise InputError(f"{key} is {value}; it takes a number {span}.")
    if choices and value not in choices:
        raise InputError(f"{key} is {value!r}; it takes one of {', '.join(choices)}.")
    return value


@dataclass(frozen=True)
class ModelConfig(Section, prefix="model"):
    """The network: each part turns from ⵟ to the GPT-2 baseline by its own field, or all of them by `kind`."""

    kind: str = knob("aether", "ⵟ units without normalisation, or the GPT-2 baseline", choices=tuple(KINDS))
    size: str = knob("tiny", "preset of layers, heads and width", choices=tuple(SIZES))
    layers: int = knob(0, "blocks (0: by size)", low=0, auto=True)
    heads: int = knob(0, "attention heads (0: by size)", low=0, auto=True)
    width: int = knob(0, "width of the residual stream (0: by size)", low=0, auto=True)
    hidden: int = knob(0, "hidden units of the MLP (0: 4 x width)", low=0, auto=True)
    vocab: int = knob(0, "ids that may be predicted (0: the tokenizer's)", low=0, auto=True)
    attention: str = knob(AUTO, "score of query and key", choices=(AUTO, "yat", "dot"), auto=True)
    mlp: str = knob(AUTO, "hidden unit", choices=(AUTO, "yat", "gelu"), auto=True)
    norm: str = knob(AUTO, "normalisation before each branch", choices=(AUTO, "none", "layernorm"), auto=True)
    position: str = knob(AUTO, "position by rotation or by a table", choices=(AUTO, "rotary", "learned"), auto=True)
    head: str = knob(AUTO, "output matrix: the embedding's or its own", choices=(AUTO, "tied", "untied"), auto=True)
    linear_bias: str = knob(AUTO, "biases in linear maps", choices=(AUTO, "yes", "no"), auto=True)
    attention_impl: str = knob(
        "auto",
        "whole score matrices, blocks of them in linear memory, or a kernel of the platform (auto: the best there is)",
        choices=(AUTO, "plain", "blockwise", "flash"),
        free=True,
    )
    rope_theta: float = knob(10000.0, "base of the rotary wavelengths", low=1.0)
    spherical: bool = knob(True, "ⵟ on unit vectors x/|x|, w/|w|")
    epsilon: float = knob(0.3, "initial ε of the ⵟ denominator (learned)", low=1e-6)
    attention_alpha: float = knob(8.0, "initial α of attention scores (learned per head)", low=0.0)
    mlp_alpha: float = knob(16.0, "initial α of hidden units (learned per layer)", low=0.0)
    yat_bias: float = knob(0.1, "initial b = softplus(bias) of ⵟ units (learned; 0: no bias)", low=0.0)
    embed_std: float = knob(
        0.0, "initial standard deviation of embeddings (0: 1 for aether, 0.02 for gpt2)", low=0.0, auto=True
    )
    dropout: float = knob(0.0, "dropout on embeddings and on the output of each branch", low=0.0, high=0.9)
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
    def rows(self) -> int:
        """Rows of the embedding: `vocab` padded to a multiple of `vocab_multiple`."""
        return -(-self.vocab // self.vocab_multiple) * self.vocab_multiple

    def resolved(self, vocab: int) -> Self:
        """Decide what `kind` and `size` leave open; `vocab` is the tokenizer's number of ids, 0 if not known yet."""
        decided: dict[str, Any] = {**SIZES[self.size], **KINDS[self.kind], "vocab": vocab}
        new = {k: v if getattr(self, k) in (0, AUTO) else getattr(self, k) for k, v in decided.items()}
        new["hidden"] = self.hidden or 4 * new["width"]
        width, heads = new["width"], new["heads"]
        if width % heads:
            raise InputError(f"model.width is {width} and model.heads {heads}; make the width a multiple of the heads.")
        if new["position"] == "rotary" and width // heads % 2:
            raise InputError(f"model.width / model.heads is {width // heads}; rotary positions need it to be even.")
        if new["vocab"] < vocab:
            raise InputError(
                f"model.vocab is {new['vocab']} but the tokenizer has {vocab} ids; set it to 0 or at least {vocab}."
            )
        return dataclasses.replace(self, **new)


@dataclass(frozen=True)
class DataConfig(Section, prefix="data"):
    """The text, and how batches are cut from it."""

    path: str = knob(
        "python:stdlib", "the training text: file, folder, glob, prepared folder, python:stdlib or tfds:NAME"
    )
    mixture: dict[str, str] = knob({}, "several training texts, NAME -> path, instead of data.path")
    weights: dict[str, float] = knob({}, "share of each text of the mixture, NAME -> weight (default: equal)")
    validation: dict[str, str] = knob(
        {}, "validation texts, NAME -> path (default: `validation`, held out of the training text)"
    )
    validation_fraction: float = knob(0.1, "share held out when data.validation is empty", low=0.0, high=0.9)
    tokenizer: str = knob("bytes", "bytes, chars, a SentencePiece .model file, or gpt2:FOLDER with GPT-2's BPE files")
    text_key: str = knob("text", "the field with the text in JSONL, Parquet and TFDS records")
    tfds_dir: str = knob("", "where TFDS data sets lie prepared (empty: TFDS's default)", free=True)
    context: int = knob(256, "tokens a sequence that the model sees and predicts", low=2)
    batch_size: int = knob(32, "sequences a step, over all hosts", low=1)
    segments: bool = knob(True, "keep attention inside documents that are packed together")
    workers: int = knob(0, "processes that read batches (0: a thread)", low=0, high=256, free=True)
    prefetch: int = knob(4, "batches read ahead", low=1, high=1024, free=True)
    cache_dir: str = knob("", "where prepared corpora are kept (empty: $AETHER_CACHE or ~/.cache/aether)", free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if set(self.weights) - set(self.mixture):
            extra = ", ".join(sorted(set(self.weights) - set(self.mixture)))
            raise InputError(
                f"data.weights names {extra}, which data.mixture does not have; it has {sorted(self.mixture)}."
            )
        for name, weight in self.weights.items():
            if not (math.isfinite(weight) and weight > 0):
                raise InputError(f"data.weights.{name} is {weight}; it takes a number above 0.")
        if "train" in self.validation:
            raise InputError(
                "data.validation.train is a reserved name (metrics.jsonl uses it); call the set something else."
            )


@dataclass(frozen=True)
class OptimConfig(Section, prefix="optim"):
    """The optimizer, its schedule, and which parameters they treat apart."""

    name: str = knob("adamw", "adamw, or muon for matrices with AdamW for the rest", choices=("adamw", "muon"))
    learning_rate: float = knob(0.0, "peak learning rate (0: by kind and size)", low=0.0, auto=True)
    schedule: str = knob("cosine", "shape after warm-up", choices=("cosine", "wsd", "linear", "constant"))
    schedule_steps: int = knob(0, "steps of the whole schedule (0: train.steps)", low=0, auto=True)
    warmup_steps: int = knob(100, "steps of linear warm-up", low=0)
    decay_fraction: float = knob(0.2, "share of the schedule in which wsd decays", low=0.0, high=1.0)
    final_fraction: float = knob(0.1, "last learning rate / peak", low=0.0, high=1.0)
    beta1: float = knob(0.9, "decay of the first moment", low=0.0, high=0.99999)
    beta2: float = knob(0.99, "decay of the second moment", low=0.0, high=0.99999)
    eps: float = knob(1e-8, "added to the root of the second moment", low=1e-30)
    weight_decay: float = knob(0.1, "decoupled decay, times the learning rate", low=0.0)
    no_decay: str = knob(
        r"bias|alpha|epsilon|scale",
        "regular expression over parameter paths that are never decayed (vectors never are)",
    )
    lr_scale: dict[str, float] = knob(
        {}, "learning rate multiplier, regular expression over paths -> factor (first match)"
    )
    clip: float = knob(1.0, "largest global gradient norm (0: no clipping)", low=0.0)
    momentum: float = knob(0.95, "momentum of muon", low=0.0, high=0.9999)


@dataclass(frozen=True)
class TrainConfig(Section, prefix="train"):
    """The run: how long, how the loss is formed, and what is shown on the way."""

    steps: int = knob(1000, "updates to make", low=1, free=True)
    seed: int = knob(0, "seed of initialisation, data order and dropout", low=0, high=2**31 - 1)
    log_every: int = knob(1, "steps between train lines", low=1, free=True)
    eval_every: int = knob(250, "steps between evaluations (0: only at the end)", low=0, free=True)
    eval_batches: int = knob(0, "batches of each validation set (0: all of it)", low=0, free=True)
    sample_prompt: str = knob("", "how the text sample at each evaluation begins", free=True)
    sample_tokens: int = knob(128, "length of that sample (0: none)", low=0, free=True)
    accumulate: int = knob(1, "microbatches a step is split into", low=1)
    loss_chunk: int = knob(128, "positions of a sequence whose logits exist at one time", low=1)
    z_loss: float = knob(0.0, "weight of log(Z)^2", low=0.0)
    ema: float = knob(
        0.0, "decay of the averaged parameters, which evaluation then uses (0: none)", low=0.0, high=0.999999
    )
    max_skipped: int = knob(10, "non-finite steps in a row (each skipped) that end the run", low=1, free=True)
    init_from: str = knob("", "DIR or DIR@STEP: start from that run's parameters")
    profile_steps: str = knob("", "a:b writes a profiler trace of steps a+1 to b", free=True)
    wandb: str = knob("", "Weights & Biases project to log to (empty: none)", free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.profile_span()

    def profile_span(self) -> range:
        """Return the steps (counted from 0) that `profile_steps` names."""
        first, _, last = self.profile_steps.partition(":")
        if not self.profile_steps:
            return range(0)
        if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
            raise InputError(f"train.profile_steps is {self.profile_steps!r}; write two whole numbers as in 10:20.")
        return range(int(first), int(last))


@dataclass(frozen=True)
class CheckpointConfig(Section, prefix="checkpoint"):
    """When to save, and what to keep."""

    every: int = knob(500, "steps between checkpoints (0: only at the end or when stopped)", low=0, free=True)
    keep_last: int = knob(2, "newest checkpoints kept", low=1, free=True)
    keep_best: int = knob(1, "checkpoints with the lowest validation loss kept", low=0, free=True)
    keep_every: int = knob(0, "checkpoints at multiples of this step are kept for good (0: none)", low=0, free=True)


@dataclass(frozen=True)
class MeshConfig(Section, prefix="mesh"):
    """How many devices along each axis, within a slice (ICI) and across slices (DCN); -1 takes what is left."""

    data: int = knob(-1, "replicas, each with its share of the batch", low=-1, free=True)
    fsdp: int = knob(1, "like data, and parameters are split over it", low=-1, free=True)
    tensor: int = knob(1, "heads, hidden units and vocabulary are split over it", low=-1, free=True)
    sequence: int = knob(1, "positions of each sequence are split over it", low=-1, free=True)
    dcn_data: int = knob(-1, "slices along data", low=-1, free=True)
    dcn_fsdp: int = knob(1, "slices along fsdp", low=-1, free=True)
    dcn_tensor: int = knob(1, "slices along tensor", low=-1, free=True)
    dcn_sequence: int = knob(1, "slices along sequence", low=-1, free=True)
    rules: dict[str, str] = knob(
        {}, "logical axis -> mesh axes (comma-separated, or none) in place of the built-in table", free=True
    )
    max_replicated: int = knob(
        64,
        "MiB of the largest array that may lie whole on every device where fsdp or tensor split others",
        low=0,
        free=True,
    )


@dataclass(frozen=True)
class FaultsConfig(Section, prefix="faults"):
    """What may go wrong in a run, when it counts as such, and what is done then."""

    start_timeout_seconds: int = knob(300, "how long processes wait for each other at the start", low=1, free=True)
    heartbeat_timeout_seconds: int = knob(100, "silence after which a process counts as lost", low=2, free=True)
    watchdog_factor: float = knob(20.0, "report a hang after this many median steps (0: never)", low=0.0, free=True)
    watchdog_seconds: float = knob(120.0, "but not before this many seconds", low=0.1, free=True)
    record_steps: int = knob(100, "steps that the flight recorder holds", low=1, high=100000, free=True)
    spike_sigma: float = knob(0.0, "standard deviations above its window that make a loss a spike (0: none)", low=0.0)
    spike_window: int = knob(100, "steps in that window", low=2, high=100000)
    spike_action: str = knob(
        "skip",
        "skip the update, or go back to a checkpoint and leave out the batches since",
        choices=("skip", "rewind"),
    )
    max_rewinds: int = knob(3, "rewinds that end the run", low=1, free=True)


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)

    def resolved(self, vocab: int) -> Self:
        """Decide everything left at 0 or "auto" and check what spans sections."""
        model = self.model.resolved(vocab)
        rate = self.optim.learning_rate or LEARNING_RATES[model.size] * RATE_FACTORS[model.kind]
        length = self.optim.schedule_steps or self.train.steps
        optim = dataclasses.replace(self.optim, learning_rate=rate, schedule_steps=length)
        if self.data.batch_size % self.train.accumulate:
            raise InputError(
                f"data.batch_size is {self.data.batch_size} and train.accumulate {self.train.accumulate}; "
                "make the batch a multiple of the microbatches."
            )
        return dataclasses.replace(self, model=model, optim=optim)

    def continued(self, saved: "Config") -> Self:
        """Take what is left open here from the run in the workdir, so that resuming does not decide it anew."""
        sections = {}
        for f in dataclasses.fields(self):
            mine, theirs = getattr(self, f.name), getattr(saved, f.name)
            open_ = {
                g.name: getattr(theirs, g.name)
                for g in dataclasses.fields(mine)
                if g.metadata["auto"] and getattr(mine, g.name) in (0, AUTO)
            }
            sections[f.name] = dataclasses.replace(mine, **open_)
        return dataclasses.replace(self, **sections)

    def to_json(self) -> dict[str, Any]:
        """Return nested plain dicts."""
        return dataclasses.asdict(self)


def knobs() -> Iterator[tuple[str, dataclasses.Field]]:
    """Yield every knob with its dotted key."""
    for section in dataclasses.fields(Config):
        for f in dataclasses.fields(section.type):  # type: ignore[arg-type]
            yield f"{section.name}.{f.name}", f


def default_config() -> ConfigDict:
    """Return the schema's defaults as a `ConfigDict`: what a config file starts from."""
    return ConfigDict(Config().to_json(), convert_dict=True)


def build(values: Mapping[str, Any]) -> Config:
    """Make the checked `Config` from a `ConfigDict` or nested dicts; keys left out take their defaults.

    Raises:
      InputError: an unknown key, a wrong type, or a value out of range, by its dotted key.
    """
    if isinstance(values, ConfigDict):
        values = values.to_dict()
    sections: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(Config)}
    made = {}
    for name, content in values.items():
        if name not in sections:
            raise InputError(unknown_key(name, list(sections)))
        if not isinstance(content, Mapping):
            raise InputError(f"{name} is {content!r}; it takes a group of keys.")
        known = [f.name for f in dataclasses.fields(sections[name])]
        for key in content:
            if key not in known:
                raise InputError(unknown_key(f"{name}.{key}", [f"{name}.{k}" for k in known]))
        made[name] = sections[name](**content)
    return Config(**made)


def unknown_key(key: str, known: list[str]) -> str:
    """Say that `key` does not exist, with the nearest that do."""
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    return f"There is no key {key}; " + (
        f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}."
    )


def differences(old: Config, new: Config) -> list[tuple[str, Any, Any, bool]]:
    """List (dotted key, old value, new value, free to change on resume) for every knob that differs."""
    found = []
    for key, f in knobs():
        section, name = key.split(".")
        a, b = getattr(getattr(old, section), name), getattr(getattr(new, section), name)
        if a != b:
            found.append((key, a, b, f.metadata["free"]))
    return found


def dumps(record: Mapping[str, Any]) -> str:
    """Serialise as the JSON that run folders hold."""
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"
