"""The lines of a task's file: JSON objects with the fields that the task needs, or an error that names the line."""

import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from aether.data import records
from aether.errors import InputError

T = TypeVar("T")


def read_lines(file: str, parse: Callable[[dict[str, Any]], T]) -> Iterator[T]:
    """Yield parse(object) of every line that is not blank; the file is local or remote, plain or compressed.

    Raises:
      InputError: with file and line: what is no JSON object, or what `parse` refuses; or nothing is in the file.
    """
    count = 0
    with records.storage(file), records.open_binary(file) as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                count += 1
                try:
                    yield parse(_object(line))
                except InputError as e:
                    raise InputError(f"{file} line {number}: {e}") from e
    if not count:
        raise InputError(f"{file} is empty; give a file with one JSON object a line.")


def text(record: dict[str, Any], key: str, *, empty: bool = False) -> str:
    """Return the text under a key, which may be empty or not."""
    return _text(_value(record, key), repr(key), empty)


def texts(record: dict[str, Any], key: str) -> list[str]:
    """Return the list of at least two texts under a key, none of them empty."""
    value = _value(record, key)
    if not isinstance(value, list) or len(value) < 2:
        raise InputError(f"{key!r} is {_shown(value)}; it takes a list of at least two texts.")
    return [_text(v, f"entry {i} of {key!r}", False) for i, v in enumerate(value)]


def index(record: dict[str, Any], key: str, count: int) -> int:
    """Return the number under a key, one of 0 to count − 1."""
    value = _value(record, key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
        raise InputError(f"{key!r} is {_shown(value)}; it takes one of 0 to {count - 1}, the number of a choice.")
    return value


def _object(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as e:
        raise InputError(f"it is not UTF-8 at byte {e.start}; convert the file.") from e
    except (ValueError, RecursionError) as e:
        raise InputError(f"it is not JSON ({e}); mend or remove it.") from e
    if not isinstance(record, dict):
        raise InputError(f"it holds {_shown(record)}; each line takes a JSON object.")
    return record


def _value(record: dict[str, Any], key: str) -> Any:
    if key not in record:
        raise InputError(f"it has no {key!r}; it has {', '.join(map(repr, record)) or 'nothing'}.")
    return record[key]


def _text(value: Any, what: str, empty: bool) -> str:
    if not isinstance(value, str) or not (value or empty):
        raise InputError(f"{what} is {_shown(value)}; it takes text{'' if empty else ' that is not empty'}.")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise InputError(f"{what} is not valid Unicode at character {e.start}; mend or remove it.") from e
    return value


def _shown(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 40 else shown[:39] + "…"
