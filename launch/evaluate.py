"""Score a run's model on its validation data; the last line on stdout is one JSON object.

python -m launch.evaluate --workdir=runs/quickstart --data=other.txt
python -m launch.evaluate --workdir=runs/digits --pictures=digits
"""

import json
import math
import sys
from collections.abc import Mapping
from typing import Any

from absl import flags

from launch import cli

FLAGS = cli.new_flags()
flags.DEFINE_string("workdir", "", "folder of the run", flag_values=FLAGS)
flags.DEFINE_integer("step", None, "checkpoint to load (none: the last)", flag_values=FLAGS, lower_bound=0)
flags.DEFINE_string("data", "", "text or images to score (empty: the run's first validation set)", flag_values=FLAGS)
flags.DEFINE_integer("batches", 0, "batches to score (0: all of it)", flag_values=FLAGS, lower_bound=0)
flags.DEFINE_string(
    "pictures", "", "folder for confusion.png and mistakes.png of a classifier (empty: the run's)", flag_values=FLAGS
)


def main(args: flags.FlagValues) -> None:
    """Evaluate and print the result."""
    workdir = cli.require(args, "workdir", "runs/quickstart")
    from aether.evaluate.run import evaluate_run

    result = evaluate_run(
        workdir, step=args.step, data=args.data or None, batches=args.batches, pictures=args.pictures or None
    )
    print(to_json(result), flush=True)


def to_json(result: Mapping[str, Any]) -> str:
    """Return one line of strict JSON: numbers that are not finite become null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in result.items()}
    return json.dumps(finite, ensure_ascii=False, allow_nan=False)


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
