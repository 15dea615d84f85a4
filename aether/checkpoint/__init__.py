"""Checkpoints: the training state as named arrays in numbered folders, written and verified in the background.

A folder `STEP/` holds `state/` (Orbax's arrays, under names made from tree paths, so that no class of Flax or Optax is
part of the format) and `meta.json`: format version, loss, the arrays, the files with their sizes and checksums (Orbax
reads a flipped bit as a number like any other), and what the caller gave.
What is being written has another name on disks, and lacks a marker on object stores, until it has been verified: a
numbered folder is a verified checkpoint.
"""

from aether.checkpoint.checkpoints import Checkpoints

__all__ = ["Checkpoints"]
