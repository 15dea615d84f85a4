"""Write a run's network for another framework, and check there that it computes the same.

python -m launch.export --workdir=runs/quickstart --to=npz --out=exports/quickstart
"""

import json
import sys

from absl import flags

from launch import cli

FLAGS = cli.new_flags()
flags.DEFINE_string("workdir", "", "folder of the run", flag_values=FLAGS)
flags.DEFINE_integer("step", None, "checkpoint to load (none: the last)", flag_values=FLAGS, lower_bound=0)
cli.define_average(FLAGS)
flags.DEFINE_string(
    "to", "", "framework: hf, torch, keras, tf, linen, onnx, stablehlo, gpt2, nmn, npz", flag_values=FLAGS
)
flags.DEFINE_string("out", "", "new folder of the export", flag_values=FLAGS)
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of the parameters that are written", flag_values=FLAGS)
flags.DEFINE_string(
    "data", "", "text or images to compare on (empty: the run's first validation set)", flag_values=FLAGS
)
flags.DEFINE_string("license", "unknown", "for the card, such as apache-2.0", flag_values=FLAGS)


def main(args: flags.FlagValues) -> None:
    """Export, and print what the comparison has found as one line of JSON."""
    workdir = cli.require(args, "workdir", "runs/quickstart")
    target, out = cli.require(args, "to", "npz"), cli.require(args, "out", "exports/quickstart")
    from aether.export.run import export_run

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    how = dict(step=args.step, average=args.average, dtype=args.dtype, data=args.data or None, licence=args.license)
    print(json.dumps(export_run(workdir, target, out, **how, log=say).record()), flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
