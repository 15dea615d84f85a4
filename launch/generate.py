"""Continue a prompt with a run's model; the text streams to stdout.

python -m launch.generate --workdir=runs/quickstart --prompt="def main(" --max_tokens=200
"""

import os
import sys
from collections.abc import Iterable
from itertools import chain

from absl import flags

from aether.errors import InputError
from launch import cli

FLAGS = cli.new_flags()
flags.DEFINE_string("workdir", "", "folder of the run", flag_values=FLAGS)
flags.DEFINE_string("prompt", "", "text to continue (empty: a new document)", flag_values=FLAGS)
flags.DEFINE_integer("max_tokens", 200, "longest continuation, in tokens", flag_values=FLAGS, lower_bound=1)
flags.DEFINE_float("temperature", 0.8, "0: always the likeliest token, 1: the model as it is", flag_values=FLAGS)
flags.DEFINE_integer("top_k", 0, "sample among the k likeliest tokens only (0: all)", flag_values=FLAGS, lower_bound=0)
flags.DEFINE_float("top_p", 1.0, "sample among the likeliest that hold this probability", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "seed of the sampling", flag_values=FLAGS, lower_bound=0, upper_bound=2**31 - 1)
flags.DEFINE_integer("num", 1, "number of samples", flag_values=FLAGS, lower_bound=1)
flags.DEFINE_integer("step", None, "checkpoint to load (none: the last)", flag_values=FLAGS, lower_bound=0)
cli.define_average(FLAGS)


def main(args: flags.FlagValues) -> None:
    """Check the flags, sample, and print as the text comes."""
    workdir = cli.require(args, "workdir", "runs/quickstart")
    if not 0 <= args.temperature < float("inf"):
        raise InputError(f"--temperature is {args.temperature}; it takes a number of at least 0.")
    if not 0 < args.top_p <= 1:
        raise InputError(f"--top_p is {args.top_p}; it takes a number above 0 and up to 1.")
    from aether.evaluate.load import load_run
    from aether.generate.decode import Decoder
    from aether.generate.text import text_streams

    run = load_run(workdir, args.step, average=args.average)
    if run.config.model.task != "lm" or run.tokenizer is None:
        raise InputError(
            f"--workdir is {workdir}, a run of {run.config.model.kind}, which does not write text; give one of "
            "model.kind=aether or gpt2."
        )
    decoder = Decoder(run.graph, run.config.data.context, run.tokenizer.eot, run.tokenizer.vocab_size)
    names = ("temperature", "top_k", "top_p", "seed", "num")
    settings = {name: getattr(args, name) for name in names}
    streams = text_streams(decoder, run.params, run.tokenizer, args.prompt, args.max_tokens, **settings)
    show([chain([args.prompt], stream) for stream in streams], args.num)


def show(samples: Iterable[Iterable[str]], num: int) -> None:
    """Print each sample piece by piece, under a line with its number if there are several."""
    try:
        for i, pieces in enumerate(samples, 1):
            if num > 1:
                print(f"--- sample {i} of {num} ---", flush=True)
            for piece in pieces:
                print(piece, end="", flush=True)
            print(flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough; python would complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
