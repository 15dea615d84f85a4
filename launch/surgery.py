"""Make a run with more or fewer hidden ⵟ units of a trained one, from which launch.train goes on.

python -m launch.surgery --workdir=runs/quickstart --grow=64 --out=runs/wider
"""

import json
import sys

from absl import flags

from aether.errors import InputError
from launch import cli

FLAGS = cli.new_flags()
flags.DEFINE_string("workdir", "", "folder of the run", flag_values=FLAGS)
flags.DEFINE_integer("step", None, "checkpoint to load (none: the last)", flag_values=FLAGS, lower_bound=0)
flags.DEFINE_integer(
    "grow",
    0,
    "units to add to each block, whose outputs stay the same; in a ResNet's stage k 2^k times as many",
    flag_values=FLAGS,
    lower_bound=0,
)
flags.DEFINE_multi_string(
    "remove",
    [],
    "units to take away, as in blocks.0.mlp.hidden=3,17; once for each block, of each as many",
    flag_values=FLAGS,
)
flags.DEFINE_float(
    "merge",
    None,
    "merge units that differ by at most this share of their length, such as 1e-6",
    flag_values=FLAGS,
    lower_bound=0.0,
)
flags.DEFINE_string(
    "data", "", "text or images to draw new centres from (empty: the run's training data)", flag_values=FLAGS
)
flags.DEFINE_float(
    "noise", 0.0, "standard deviation of noise on new centres, in that of the data", flag_values=FLAGS, lower_bound=0.0
)
flags.DEFINE_string("out", "", "new folder of the run that is made", flag_values=FLAGS)


def main(args: flags.FlagValues) -> None:
    """Operate, and print what has changed as one line of JSON."""
    workdir, out = cli.require(args, "workdir", "runs/quickstart"), cli.require(args, "out", "runs/wider")
    remove = dict(map(_units, args.remove))
    if len(remove) < len(args.remove):
        raise InputError(f"--remove names a layer twice in {' '.join(args.remove)}; list its units once.")
    from aether.train.surgery import operate

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    how = dict(grow=args.grow, remove=remove, merge=args.merge, data=args.data or None, noise=args.noise)
    print(json.dumps(operate(workdir, out, step=args.step, **how, log=say)), flush=True)


def _units(text: str) -> tuple[str, list[int]]:
    """Read LAYER=3,17."""
    layer, _, units = text.partition("=")
    if not layer or not all(unit.strip().isdecimal() for unit in units.split(",")):
        raise InputError(f"--remove is {text!r}; write a layer and its units, as in blocks.0.mlp.hidden=3,17.")
    return layer, [int(unit) for unit in units.split(",")]


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
