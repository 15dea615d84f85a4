"""Score a run's model on its validation data or on tasks; the last line on stdout is one JSON object.

python -m launch.evaluate --workdir=runs/quickstart --data=other.txt
python -m launch.evaluate --workdir=runs/digits --pictures=digits
python -m launch.evaluate --workdir=runs/quickstart --task=documents:README.md --task=choice:arc_easy.jsonl

Tasks of language models, scored as lm-evaluation-harness scores them, each NAME:PATH:
  lambada    context, continuation             perplexity and accuracy of the continuation
  choice     query, choices, gold (from 0)     accuracy, also by length of the choice (accuracy_norm)
  pairs      sentence_good, sentence_bad       how often the good sentence is the likelier one
  documents  text: a file, folder, glob, ...   perplexity by token, word and byte, bits per byte, document by document
  sliding    text                              perplexity in overlapping windows, --stride tokens apart
The first three take a file with one JSON object a line, which has these keys.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

from absl import flags

from aether.config import finite
from aether.errors import InputError
from launch import cli

FLAGS = cli.new_flags()
flags.DEFINE_string("workdir", "", "folder of the run", flag_values=FLAGS)
flags.DEFINE_integer("step", None, "checkpoint to load (none: the last)", flag_values=FLAGS, lower_bound=0)
cli.define_average(FLAGS)
flags.DEFINE_string("data", "", "text or images to score (empty: the run's first validation set)", flag_values=FLAGS)
flags.DEFINE_integer("batches", 0, "batches to score (0: all of it)", flag_values=FLAGS, lower_bound=0)
flags.DEFINE_string(
    "pictures", "", "folder for confusion.png and mistakes.png of a classifier (empty: the run's)", flag_values=FLAGS
)
flags.DEFINE_multi_string("task", [], "NAME:PATH, a task to score instead; may be given several times", FLAGS)
flags.DEFINE_integer(
    "stride", None, "tokens between windows of the task sliding (none: half the context)", 1, flag_values=FLAGS
)


def main(args: flags.FlagValues) -> None:
    """Evaluate and print the result."""
    workdir = cli.require(args, "workdir", "runs/quickstart")
    if args.task:
        _tasks(workdir, args)
        return
    if args.stride is not None:
        raise InputError(f"--stride is {args.stride}, but there is no --task=sliding:PATH; leave it out, or add one.")
    from aether.evaluate.run import evaluate_run

    asked = dict(step=args.step, data=args.data or None, batches=args.batches, pictures=args.pictures or None)
    print(to_json(evaluate_run(workdir, **asked, average=args.average)), flush=True)


def _tasks(workdir: str, args: flags.FlagValues) -> None:
    """Print a table, and the line of JSON."""
    for name in ("data", "batches", "pictures"):
        if getattr(args, name):
            raise InputError(f"--{name} and --task are both given; give one of them.")
    from aether.evaluate.tasks.run import evaluate_tasks
    from aether.evaluate.tasks.table import table

    result = evaluate_tasks(workdir, args.task, step=args.step, stride=args.stride, average=args.average)
    print(table(result["tasks"]))
    print(to_json(result), flush=True)


def to_json(result: Mapping[str, Any]) -> str:
    """Return one line of strict JSON: numbers that are not finite become null."""
    return json.dumps(finite(result), ensure_ascii=False, allow_nan=False)


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
