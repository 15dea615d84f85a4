"""Make a run of an export, to be evaluated, sampled from and trained further.

python -m launch.load --export=exports/quickstart --workdir=runs/again
"""

import sys

from absl import flags

from launch import cli

FLAGS = cli.new_flags()
flags.DEFINE_string("export", "", "folder of an export to npz, torch or hf", flag_values=FLAGS)
flags.DEFINE_string("workdir", "", "new folder of the run", flag_values=FLAGS)


def main(args: flags.FlagValues) -> None:
    """Load, and say what can be done with it."""
    export, workdir = cli.require(args, "export", "exports/quickstart"), cli.require(args, "workdir", "runs/again")
    from aether.export.load import load_export

    load_export(export, workdir)
    print(f"python -m launch.train --workdir={workdir} --config=... goes on with it.")


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
