"""Make a run of an export, to be evaluated, sampled from and trained further.

python -m launch.load --export=exports/quickstart --workdir=runs/again
"""

import sys

from absl import flags

from launch import cli

FLAGS = cli.new_flags()
flags.DEFINE_string("export", "", "folder of an export to npz, torch, hf or gpt2", flag_values=FLAGS)
flags.DEFINE_string("tokenizer", "", "of a GPT-2 that Aether has not exported, such as gpt2:FOLDER", flag_values=FLAGS)
flags.DEFINE_string("workdir", "", "new folder of the run", flag_values=FLAGS)


def main(args: flags.FlagValues) -> None:
    """Load."""
    export, workdir = cli.require(args, "export", "exports/quickstart"), cli.require(args, "workdir", "runs/again")
    from aether.export.load import load_export

    load_export(export, workdir, tokenizer=args.tokenizer)


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
