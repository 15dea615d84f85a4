"""What a group of knobs is: fields with a default, a check and a help."""

import dataclasses
import math
import typing
from dataclasses import field
from typing import Any

from aether.errors import InputError

AUTO = "auto"


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
