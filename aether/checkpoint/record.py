"""What `meta.json` says of a checkpoint, and whether the files agree with it."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from aether import storage
from aether.checkpoint import tensors
from aether.errors import InputError

FORMAT = 1
META = "meta.json"
STATE = "state"  # the folder of the arrays

# Format n -> what turns the record (the content of meta.json) of format n into one of n + 1. An array is renamed by
# moving its entry in record["arrays"]; "key" in the entry goes on naming it on disk.
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}


def make_record(step: int, leaves: dict[str, Any], meta: Mapping[str, Any], loss: float | None) -> dict[str, Any]:
    """Return the record of a state that is to be saved, without its files.

    Raises:
      TypeError: JSON cannot hold `meta`.
    """
    record = {
        "format": FORMAT,
        "step": step,
        "loss": float(loss) if loss is not None and math.isfinite(loss) else None,
        "arrays": {k: {"key": k, "shape": list(v.shape), "dtype": str(v.dtype)} for k, v in leaves.items()},
        "meta": dict(meta),
    }
    json.dumps(record)
    return record


def seal(folder: Any, record: dict[str, Any], sums: bool) -> None:
    """Write the record with the fingerprints of the files, the last file of a checkpoint.

    Args:
      folder: the checkpoint.
      record: from `make_record`.
      sums: with checksums; object stores have their own.
    """
    state = folder / STATE
    storage.persist(state)
    files = {str(p.relative_to(folder)): storage.fingerprint(p, sums) for p in storage.files_of(state)}
    storage.write_through(folder / META, json.dumps({**record, "files": files}))


def verify(folder: Any, record: dict[str, Any]) -> None:
    """Read a sealed checkpoint back from the disk and compare it with what was asked to be saved.

    Raises:
      DamagedError: the record, an array's name, shape or dtype, or a file is not as it was written.
    """
    written = read_record(folder)
    files = written.pop("files")
    if written != json.loads(json.dumps(record)):
        raise storage.DamagedError(f"{META} is not as it was written")
    storage.verify(folder, files, sums=True, fresh=True)
    wanted = {v["key"]: (v["shape"], v["dtype"]) for v in record["arrays"].values()}
    found = tensors.described(folder / STATE)
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise storage.DamagedError(f"{name} is {found.get(name)} in its files, not {wanted.get(name)}")


def read_record(folder: Any) -> dict[str, Any]:
    """Read meta.json, brought to the present format.

    Raises:
      DamagedError: it is missing or garbled.
      InputError: a format that this version does not know.
    """
    try:
        record = json.loads((folder / META).read_text())
        version = int(record["format"])
    except (FileNotFoundError, ValueError, KeyError, TypeError) as e:
        raise storage.DamagedError(f"{folder}/{META} cannot be read: {storage.one_line(e)}") from e
    if version > FORMAT:
        raise InputError(
            f"Checkpoint {folder} has format {version}, and this Aether reads up to format {FORMAT}; update Aether."
        )
    for old in range(version, FORMAT):
        if old not in UPGRADES:
            raise InputError(f"Checkpoint {folder} has format {version}; this Aether, at {FORMAT}, cannot read it.")
        record = UPGRADES[old](record)
    return record
