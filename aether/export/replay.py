"""The process in which an export is run: reads inputs-*.npy, writes logits-*.npy beside them.

python -m aether.export.replay TARGET FOLDER WORK
"""

import sys
from pathlib import Path

import numpy as np

from aether.export.targets import TARGETS


def main(target: str, folder: str, work: str) -> None:
    """Run every batch through the network of an export, by its own files."""
    files = sorted(Path(work).glob("inputs-*.npy"))
    batches = (np.load(file, allow_pickle=False) for file in files)
    for file, logits in zip(files, TARGETS[target].replay(Path(folder), batches), strict=True):
        np.save(file.with_name(file.name.replace("inputs", "logits")), np.asarray(logits))


if __name__ == "__main__":
    main(*sys.argv[1:])
