"""Files of arrays in the format of safetensors: a header in JSON, then the bytes; there is nothing in them to run.

Arrays are written one after the other and read by mapping the file, so that neither holds a second copy of a network.
Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from aether.errors import InputError

_NAMES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_LONGEST = 100_000_000  # bytes of a header, as in the library


def write_tensors(path: Path, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write arrays, which may be views in any order of their axes."""
    names = {np.dtype(dtype): name for name, dtype in _NAMES.items()}
    listed = list(arrays)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name, a in listed:
        start, end = end, end + a.nbytes
        header[name] = dict(dtype=names[a.dtype], shape=a.shape, data_offsets=(start, end))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, a in listed:
            file.write(np.ascontiguousarray(a).view(np.uint8).data if a.ndim else a.tobytes())


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a file by name, mapped and not loaded.

    Raises:
      InputError: it is not there, or is not whole.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(_LONGEST, size - 8):
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        raw = np.memmap(path, np.uint8, "r", offset=8 + length) if size > 8 + length else np.zeros(0, np.uint8)
        return {name: _array(raw, name, **entry) for name, entry in header.items()}
    except FileNotFoundError as e:
        raise InputError(f"{path} is not there; give the folder of an export that has {path.name}.") from e
    except (ValueError, TypeError, AttributeError) as e:
        raise InputError(f"{path} is damaged, or no file of safetensors ({e}); export or fetch it again.") from e


def _array(raw: np.ndarray, name: str, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    if dtype not in _NAMES:
        raise ValueError(f"{name} is of dtype {dtype}; known are {', '.join(_NAMES)}")
    start, end = data_offsets
    if not 0 <= start <= end <= raw.size or end - start != math.prod(shape) * np.dtype(_NAMES[dtype]).itemsize:
        raise ValueError(f"{name} {shape} at {start}:{end} of {raw.size} bytes")
    return raw[start:end].view(_NAMES[dtype]).reshape(shape)
