"""Train a model, or go on with the run in the workdir.

python -m launch.train --config=configs/quickstart.py --config.train.steps=200 --workdir=runs/first
"""

import sys
from pathlib import Path

from absl import flags

from launch import STARTED, cli

FLAGS = cli.new_flags(config=True)
flags.DEFINE_string(
    "workdir", "", "folder of the run, gs:// and s3:// too (empty: runs/NAME for NAME.py)", flag_values=FLAGS
)


def main(args: flags.FlagValues) -> None:
    """Check the config, then train."""
    config = cli.config_of(args)
    workdir = args.workdir or f"runs/{Path(args.config).stem}"
    from aether.train.loop import train  # JAX comes with it: late, so that a mistake in the config is told at once

    train(config, workdir, started=STARTED)


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
