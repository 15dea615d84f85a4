"""Train a model, or go on with the run in the workdir; or report where a run's time went.

python -m launch.train --config=configs/quickstart.py --config.train.steps=200 --workdir=runs/first
python -m launch.train --workdir=runs/first --report
"""

import sys
from pathlib import Path

from absl import flags

from launch import STARTED, cli

FLAGS = cli.new_flags(config=True)
flags.DEFINE_string(
    "workdir", "", "folder of the run, gs:// and s3:// too (empty: runs/NAME for NAME.py)", flag_values=FLAGS
)
flags.DEFINE_bool(
    "report", False, "print where the wall time of the run in --workdir went, over all its restarts", flag_values=FLAGS
)


def main(args: flags.FlagValues) -> None:
    """Check the config, then train; or report."""
    if args.report:
        workdir = cli.require(args, "workdir", "runs/quickstart")
        from aether.train.ledger import report

        print(report(workdir))
        return
    config = cli.config_of(args)
    workdir = args.workdir or f"runs/{Path(args.config).stem}"
    from aether.report.run import at_the_end  # JAX comes with it: late, so that a mistake is told at once
    from aether.train.loop import train

    report = at_the_end(config, workdir)
    if train(config, workdir, started=STARTED):
        report()


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__, several=True))
