"""Run lm-evaluation-harness on a run's model: what follows -- is the harness's own command line.

python -m launch.harness --workdir=runs/shakespeare -- --tasks lambada_openai --limit 100
python -m launch.harness --workdir=runs/shakespeare -- --tasks mine --include_path tasks/ --output_path results/

Tasks and their data come from the network; a task of your own, a YAML file that names local data, needs none
(HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 keeps the harness from trying).
"""

import json
import sys

from absl import flags

from aether.errors import InputError
from launch import cli

FLAGS = cli.new_flags()
flags.DEFINE_string("workdir", "", "folder of the run", flag_values=FLAGS)
flags.DEFINE_integer("step", None, "checkpoint to load (none: the last)", flag_values=FLAGS, lower_bound=0)
cli.define_average(FLAGS)


def main(args: flags.FlagValues, words: list[str]) -> None:
    """Register the model, and hand over to the harness."""
    workdir = cli.require(args, "workdir", "runs/quickstart")
    for word in words:
        if word.partition("=")[0] in ("--model", "--model_args", "-M", "-a"):
            raise InputError(f"{word} is given, but the model is that of --workdir; leave it out.")
    from aether.evaluate.harness import AetherLM  # noqa: F401  registers itself, or names the missing extra

    model = dict(workdir=workdir, average=args.average) | ({} if args.step is None else dict(step=args.step))
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", "--model", "aether", "--model_args", json.dumps(model)]
    sys.argv += words[1:] if words[:1] == ["run"] else words
    cli_evaluate()


def divided(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return what is before and behind the first `--`."""
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


if __name__ == "__main__":
    ours, theirs = divided(sys.argv[1:])
    sys.exit(cli.run(lambda args: main(args, theirs), FLAGS, __doc__, ours))
