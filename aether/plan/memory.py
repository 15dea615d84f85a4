"""Memory a device: what the state takes by its shardings, and what the compiler adds."""

import re
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Memory:
    """Bytes on one device; `activations` are gradients, activations and other temporaries."""

    parameters: int
    optimizer: int
    activations: int
    padding: int
    code: int
    host: int = 0

    @property
    def total(self) -> int:
        """Return what must fit."""
        return self.parameters + self.optimizer + self.activations + self.padding + self.code

    def to_json(self) -> dict[str, int]:
        """Return the parts and their sum."""
        parts = {k: getattr(self, k) for k in ("parameters", "optimizer", "activations", "padding", "code")}
        return {**parts, "total": self.total}


def bytes_on_device(tree: Any) -> int:
    """Return the bytes of one device's shards of a tree of shapes with shardings."""
    return sum(
        int(np.prod(s.sharding.shard_shape(s.shape), dtype=np.int64)) * s.dtype.itemsize for s in jax.tree.leaves(tree)
    )


def measured(compiled: Any, like: Any, batch: Any) -> Memory:
    """Split what `memory_analysis()` says: arguments + outputs − aliased + temporaries + code.

    Args:
      compiled: the step.
      like: the state's shapes with shardings.
      batch: the batch's.
    """
    m = compiled.memory_analysis()
    parameters, state, rows = bytes_on_device(like.params), bytes_on_device(like), bytes_on_device(batch)
    kept = m.output_size_in_bytes - m.alias_size_in_bytes
    return Memory(
        parameters=parameters,
        optimizer=state - parameters,
        activations=m.temp_size_in_bytes + rows + kept,
        padding=m.argument_size_in_bytes - state - rows,
        code=m.generated_code_size_in_bytes,
        host=m.host_temp_size_in_bytes + m.host_argument_size_in_bytes,
    )


def refused(message: str, like: Any) -> Memory | None:
    """Read the compiler's RESOURCE_EXHAUSTED of a step; None if it gives no number."""
    found = wanted(message)
    if not found:
        return None
    said, whole = found
    parameters, state = bytes_on_device(like.params), bytes_on_device(like)
    return Memory(parameters, state - parameters, max(said - state, 0) if whole else said, 0, 0)


def wanted(message: str) -> tuple[int, bool] | None:
    """Return the bytes that a refused program would need, and whether they are those of all of it.

    The compiler says "Used 20.1G of 15.75G hbm" of a whole program, or of what is beside the arguments, "memory
    required for HLO temporaries (94.1G)".
    """
    whole = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
    beside = re.search(r"temporaries \(([\d.]+)([KMGT]?)\) exceeds", message)
    found = whole or beside
    return (round(float(found.group(1)) * UNITS[found.group(2)]), bool(whole)) if found else None
