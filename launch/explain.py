"""Take a run's network apart: a report with what made its guesses, what its prototypes are, and how much they can do.

python -m launch.explain --workdir=runs/quickstart
python -m launch.explain --workdir=runs/quickstart --what=attribution --text="def main(argv):" --out=explained

Writes report.html, one page that needs no other file and no network, explain.json with all its numbers, and the
pictures in explain/. Parts:
  attribution   which layers, units, tokens or places made a guess; adds up to the logit
  first_layer   the first layer of a network that reads images, as pictures
  prototypes    the inputs nearest to units, silent and equal units
  capacity      norms in the RKHS, spectra, Rademacher bounds; over the checkpoints that are kept
  outside       how well inputs that are none of the data's kind are told from them, and when to abstain
  lazy          what it costs to evaluate only the nearest prototypes
  features      ⵟ layers as linear models of a finite feature map
Of a baseline, parts that need ⵟ units say so, and the others are done.
"""

import json
import sys

from absl import flags

from launch import cli

FLAGS = cli.new_flags()
flags.DEFINE_string("workdir", "", "folder of the run", flag_values=FLAGS)
flags.DEFINE_integer("step", None, "checkpoint to load (none: the last)", flag_values=FLAGS, lower_bound=0)
cli.define_average(FLAGS)
flags.DEFINE_list("what", [], "parts, separated by commas (none: all)", flag_values=FLAGS)
flags.DEFINE_string("out", "", "folder of the report (empty: the run's)", flag_values=FLAGS)
flags.DEFINE_string("data", "", "text or images to look at (empty: the run's first validation set)", flag_values=FLAGS)
flags.DEFINE_integer("inputs", 100, "how many texts or images of them", flag_values=FLAGS, lower_bound=1)
flags.DEFINE_integer("length", 128, "tokens of each text", flag_values=FLAGS, lower_bound=2)
flags.DEFINE_multi_string("text", [], "a text whose last token is taken apart instead; several times too", FLAGS)
flags.DEFINE_multi_string("layer", [], "layer whose prototypes are shown; several times too", flag_values=FLAGS)
flags.DEFINE_multi_integer("unit", [], "unit of the layer; several times too", flag_values=FLAGS)
flags.DEFINE_multi_string("outside", [], "NAME:PATH, data that are not the run's; several times too", FLAGS)
flags.DEFINE_string("baseline", "", "folder of a run whose first layer is shown beside", flag_values=FLAGS)


def main(args: flags.FlagValues) -> None:
    """Explain, and print where the report is as one line of JSON."""
    workdir = cli.require(args, "workdir", "runs/quickstart")
    from aether.report.run import explain_run
    from aether.report.subject import Asked

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    asked = Asked(
        data=args.data or None,
        inputs=args.inputs,
        length=args.length,
        texts=tuple(args.text),
        layers=tuple(args.layer),
        units=tuple(args.unit),
        outside=dict(cli.named(text, "outside") for text in args.outside),
        baseline=args.baseline,
    )
    how = dict(step=args.step, average=args.average, asked=asked, log=say)
    print(json.dumps(explain_run(workdir, args.what, args.out or None, **how), ensure_ascii=False), flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
