"""A config file and `--config.KEY=VALUE`, turned into the checked `Config`.

The words of the command line are typed by the schema, not by ml_collections' config_flags: that one takes no new
names in dictionaries, no dots in a name (regular expressions have them), and answers a typo with a traceback.
"""

import difflib
import importlib.machinery
import importlib.util
import traceback
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from aether.config import Config, build, knobs, unknown_key
from aether.errors import InputError

EXPECTED = {int: "a whole number (int)", float: "a number (float)", bool: "true or false (bool)"}
TRUTH = {"true": True, "1": True, "false": False, "0": False}


def make_config(path: str, overrides: Iterable[str]) -> Config:
    """Read the config file at `path`, apply `KEY=VALUE` overrides in order, and check the whole."""
    values = load_config(path)
    for override in overrides:
        key, _, text = override.partition("=")
        apply(values, key, text)
    return build(values)


def load_config(path: str) -> dict[str, Any]:
    """Run `get_config()` of a python file and return its values as nested dicts; any failure is an `InputError`."""
    if not Path(path).is_file():
        raise InputError(f"--config is {path}, but there is no such file; {_other_files(Path(path))}")
    loader = importlib.machinery.SourceFileLoader("aether_config_file", path)
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    try:
        loader.exec_module(module)
        made = module.get_config() if hasattr(module, "get_config") else None
        values = made.to_dict() if isinstance(made, ConfigDict) else None
    except Exception as error:
        raise InputError(f"{path}{_line(error, path)}: {type(error).__name__}: {_first_line(error)}") from error
    if not hasattr(module, "get_config"):
        raise InputError(f"{path} has no get_config(); define it to return an edited aether.config.default_config().")
    if values is None:
        raise InputError(
            f"{path}: get_config() returned {type(made).__name__}, not a ConfigDict; "
            "let it return an edited aether.config.default_config()."
        )
    return values


def apply(values: dict[str, Any], key: str, text: str) -> None:
    """Set `key` ("section.field", or "section.field.NAME" for a dictionary) to what `text` says.

    An empty value without NAME empties a dictionary, so that the command line can replace a config file's entries.
    """
    section, field, name = (key.split(".", 2) + ["", ""])[:3]
    known = dict(knobs())
    knob = known.get(f"{section}.{field}")
    kind = knob and (typing.get_origin(knob.type) or knob.type)
    if knob is None or (name and kind is not dict):
        raise InputError(_no_such_key(key, list(known)))
    group = values.setdefault(section, {})
    if not isinstance(group, dict):
        raise InputError(f"{section} is {group!r} in the config file; it takes a group of keys.")
    if kind is not dict:
        group[field] = parse(key, text, kind)
    elif name:
        group.setdefault(field, {})[name] = parse(key, text, typing.get_args(knob.type)[1])
    elif text:
        raise InputError(f"{key} is {text!r}; it takes entries, one by one, as --config.{key}.NAME=VALUE.")
    else:
        group[field] = {}


def parse(key: str, text: str, kind: Any) -> Any:
    """Read `text` as `kind`; whole numbers may be written as 1e6."""
    try:
        if kind is bool:
            return TRUTH[text.lower()]
        return _integer(text) if kind is int else kind(text)
    except (ValueError, KeyError):
        raise InputError(f"{key} is {text!r}; it takes {EXPECTED[kind]}.") from None


def takes_no_word(key: str) -> bool:
    """Say whether `--config.KEY` alone is complete: true for switches."""
    return any(k == key and f.type is bool for k, f in knobs())


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer() or abs(number) > 2**53:
            raise
        return int(number)


def _no_such_key(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return unknown_key(key, known if near else sorted({k.split(".")[0] for k in known}))


def _other_files(path: Path) -> str:
    others = sorted(str(p) for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
    near = difflib.get_close_matches(str(path), others, n=2)
    return f"did you mean {' or '.join(near)}?" if near else "give a python file with a function get_config()."


def _line(error: Exception, path: str) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    number = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    return f", line {number}" if number else ""


def _first_line(error: Exception) -> str:
    return (str(error.args[0]) if error.args else "no message").strip().split("\n")[0]
