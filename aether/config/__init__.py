"""The schema: every knob with its default, its check and its help, in one place.

A config travels as `ConfigDict` (a file's `get_config()`, edited by flags) -> `build()` -> `Config`, frozen and
checked. `Config.resolved(vocab)` then decides what was left at 0 or "auto". Nothing here imports JAX.
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from ml_collections import ConfigDict

from aether.config.data import DataConfig, ImageConfig, Pictures
from aether.config.kinds import BASE_LAYERS, BASELINES, GROUPED_RATE, KINDS, LEARNING_RATES, RATE_FACTORS, RATES, SIZES
from aether.config.model import ModelConfig
from aether.config.run import CheckpointConfig, FaultsConfig, MeshConfig, OptimConfig, TrainConfig
from aether.config.section import AUTO
from aether.errors import InputError

__all__ = [
    "AUTO",
    "KINDS",
    "SIZES",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "FaultsConfig",
    "ImageConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "Pictures",
    "TrainConfig",
    "build",
    "build_saved",
    "default_config",
    "differences",
    "dumps",
    "knobs",
    "unknown_key",
]


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)

    def resolved(self, vocab: int = 0, pictures: Pictures | None = None) -> Self:
        """Decide everything left at 0 or "auto" and check what spans sections.

        Args:
          vocab: the tokenizer's number of ids; 0 if not known yet.
          pictures: what the data say of images; None if not known yet, or for text.
        """
        image = self.image
        if pictures is not None:
            known = dataclasses.asdict(pictures)
            image = dataclasses.replace(
                image, **{k: getattr(image, k) or known[k] for k in ("size", "channels", "mean", "std")}
            )
        model = self.model.resolved(pictures.classes if pictures else vocab, image.size)
        rates = RATES[model.kind] if self.optim.rates == AUTO else self.optim.rates
        if rates == "grouped" and model.family == "resnet":
            raise InputError(f"optim.rates is grouped, which is for transformers, not for {model.kind}; set it to one.")
        usual = LEARNING_RATES[model.family][model.size] * RATE_FACTORS[model.kind]
        rate = self.optim.learning_rate or (GROUPED_RATE if rates == "grouped" else usual)
        self._check_task()
        if self.optim.rkhs_decay and not model.prototypes:
            raise InputError(
                f"optim.rkhs_decay is {self.optim.rkhs_decay}, but this {model.kind} has no ⵟ units in MLPs, "
                f"convolutions or the head; set it to 0, or model.kind to one of {', '.join(BASELINES)}."
            )
        self._check_telemetry(model)
        length = self.optim.schedule_steps or self.train.steps
        no_muon = model.points if self.optim.no_muon == AUTO else self.optim.no_muon
        depth = self.optim.base_layers or BASE_LAYERS
        optim = dataclasses.replace(
            self.optim, learning_rate=rate, rates=rates, base_layers=depth, schedule_steps=length, no_muon=no_muon
        )
        if self.data.batch_size % self.train.accumulate:
            raise InputError(
                f"data.batch_size is {self.data.batch_size} and train.accumulate {self.train.accumulate}; "
                "make the batch a multiple of the microbatches."
            )
        return dataclasses.replace(self, model=model, image=image, optim=optim)

    def _check_telemetry(self, model: ModelConfig) -> None:
        train, rows = self.train, self.data.batch_size
        if train.telemetry_every and not model.has_units:
            raise InputError(
                f"train.telemetry_every is {train.telemetry_every}, but this {model.kind} has no ⵟ units to look at; "
                f"set it to 0, or model.kind to one of {', '.join(BASELINES)}."
            )
        if train.telemetry_every and train.telemetry_rows > rows:
            raise InputError(
                f"train.telemetry_rows is {train.telemetry_rows} and data.batch_size {rows}; a look takes rows of one "
                f"batch, at most {rows}."
            )

    def _check_task(self) -> None:
        """Refuse what the task has no use for."""
        mask_rate = DataConfig.__dataclass_fields__["mask_rate"].default
        if self.model.task != "mlm" and self.data.mask_rate != mask_rate:
            raise InputError(
                f"data.mask_rate is {self.data.mask_rate}, but {self.model.kind} fills in no masked text; set it to "
                f"{mask_rate}, or model.kind to minibert."
            )
        if self.unit == "images":
            if self.train.z_loss:
                raise InputError(f"train.z_loss is {self.train.z_loss}, which is for texts; set it to 0.")
            return
        for f in dataclasses.fields(self.image):
            value = getattr(self.image, f.name)
            if value != f.default:
                raise InputError(
                    f"image.{f.name} is {value!r}, but {self.model.kind} reads text; set it to {f.default!r}."
                )

    @property
    def unit(self) -> str:
        """What a run counts: tokens or images."""
        return "images" if self.model.task == "classify" else "tokens"

    @property
    def per_step(self) -> int:
        """How many of them a step takes, over all devices."""
        return self.data.batch_size * (self.data.context if self.unit == "tokens" else 1)

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


def build_saved(values: Mapping[str, Any]) -> Config:
    """Make the `Config` of a run's config.json; what it lacks, being from before a key came, is what it did then."""
    layers = values.get("model", {}).get("layers", 0)
    optim = {"base_layers": max(BASE_LAYERS, layers), **values.get("optim", {})}
    return build({**values, "optim": optim})


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


def finite(value: Any) -> Any:
    """Return a JSON value with null in place of numbers that are not finite, which strict JSON does not know."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
