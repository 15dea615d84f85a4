"""A process in which a part of an export runs, which sees nothing but files.

Writing needs Aether and JAX, finishing and running the other framework: in one process they would hold a network twice,
and some cannot be imported side by side. What goes wrong is left in WORK/error.json: the error's class if it is one of
`aether.errors`, and its text. The process ends when its stdin does, which is when whoever started it is gone.

python -m aether.export.child write|finish|replay TARGET MADE WORK
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path

from aether.errors import AetherError
from aether.export import source
from aether.export.targets import find
from aether.storage import storage_errors


def main(part: str, target: str, made: Path, work: Path) -> None:
    """Run one of the parts."""
    to, asked = find(target), source.Asked.load(work)
    with storage_errors(asked.out):
        if part == "write":
            from aether.export.write import write

            write(asked, to, made, work, lambda line: print(line, flush=True))
        elif part == "finish" and to.finish is not None:
            to.finish(made)
        elif part == "replay":
            source.save_logits(work, to.replay(made, source.load_inputs(work)))


def end_with_stdin() -> None:
    """End this process with the one that holds the other end of its stdin; Ctrl-C is for that one alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()


def told(error: Exception) -> dict[str, str]:
    """Return what error.json says of an error."""
    ours = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == AetherError.__module__]
    return dict(kind=ours[0], text=str(error)) if ours else dict(kind="", text=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    end_with_stdin()
    made, work = Path(sys.argv[3]), Path(sys.argv[4])
    try:
        main(sys.argv[1], sys.argv[2], made, work)
    except Exception as e:
        (work / source.ERROR).write_text(json.dumps(told(e)), encoding="utf-8")
        raise
