"""The process in which a target finishes an export by its framework, before anything is run.

python -m aether.export.finish TARGET FOLDER
"""

import sys
from pathlib import Path

from aether.export.targets import TARGETS


def main(target: str, folder: str) -> None:
    """Write what is left to be written."""
    finish = TARGETS[target].finish
    if finish is not None:
        finish(Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
