"""A process in which a part of an export runs, which sees nothing but files.

Writing needs Aether and JAX, finishing and running the other framework: in one process they would hold a network twice,
and some cannot be imported side by side. What goes wrong is on the last line of stderr.

python -m aether.export.child write|finish|replay TARGET MADE WORK
"""

import sys
from pathlib import Path

from aether.data.encode import end_with_parent
from aether.export import source
from aether.export.targets import find
from aether.storage import storage_errors


def main(part: str, target: str, made: Path, work: Path) -> None:
    """Run one of the parts."""
    end_with_parent()
    to, asked = find(target), source.Asked.load(work)
    with storage_errors(asked.out):
        if part == "write":
            from aether.export.write import write

            write(asked, to, made, work, lambda line: print(line, flush=True))
        elif part == "finish" and to.finish is not None:
            to.finish(made)
        elif part == "replay":
            source.save_logits(work, to.replay(made, source.load_inputs(work)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
