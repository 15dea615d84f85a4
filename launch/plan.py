"""Say what a training step would need on machines that are not here: does it fit, what limits it, what is sent.

python -m launch.plan --config=configs/aether_124m.py --vocab=50257 --topology=v5e:4x4 --config.mesh.fsdp=4
  --search                 tries batches, rematerialisation and meshes, and prints those that fit
  --scaling=16,64,256      grows the topology, the batch a chip staying that of --batch on the first

The step is compiled by the TPU's own compiler (pip install 'aether[plan]'); GPUs are estimated from their data sheets.
docs/plan.md says what the numbers mean.
"""

import dataclasses
import json
import sys

from absl import flags

from aether.config import Config
from aether.errors import InputError
from launch import cli

FLAGS = cli.new_flags(config=True)
flags.DEFINE_string("topology", "", "v5p:8x8x8, v5e:16x16, tpu7x:4x4x4 ..., or GPUs: h100:16", flag_values=FLAGS)
flags.DEFINE_integer("slices", 1, "slices of that topology, joined by their data centre", 1, flag_values=FLAGS)
flags.DEFINE_integer("batch", 0, "sequences or images a step (0: data.batch_size)", 0, flag_values=FLAGS)
flags.DEFINE_integer("context", 0, "tokens a sequence (0: data.context)", 0, flag_values=FLAGS)
flags.DEFINE_integer("vocab", 0, "ids of the tokenizer, or classes (0: by the config)", 0, flag_values=FLAGS)
flags.DEFINE_bool("json", False, "print one JSON object", flag_values=FLAGS)
flags.DEFINE_bool("search", False, "try batches (unless --batch is given), remat and meshes", flag_values=FLAGS)
flags.DEFINE_integer("seconds", 600, "time for --search", 1, flag_values=FLAGS)
flags.DEFINE_string("scaling", "", "numbers of chips of that generation, as in 16,64,256,1024", flag_values=FLAGS)


def main(args: flags.FlagValues) -> None:
    """Plan and print."""
    config = _sized(cli.config_of(args), args)
    from aether.chips import topology
    from aether.plan import machine

    text = cli.require(args, "topology", "v5e:4x4")
    if args.scaling and args.search:
        raise InputError("--search and --scaling are both given; give one of them.")
    if args.scaling:
        from aether.plan.sizes import sizes, topology_of

        targets = [topology_of(text.partition(":")[0], n) for n in sizes(args.scaling)]
    else:
        targets = [topology(text, args.slices)]
    machine.prepare(targets, args.debug)
    from aether.plan import report  # JAX comes with it
    from aether.plan.measure import make_plan, resolved

    config = resolved(config, args.vocab)
    if args.scaling:
        _scaling(config, targets, args.json)
    elif args.search:
        from aether.plan.search import search

        found = search(config, targets[0], args.seconds, _progress, fixed_batch=bool(args.batch))
        print(json.dumps(report.search_json(found)) if args.json else report.search_text(found), flush=True)
    else:
        plan = make_plan(config, targets[0])
        print(json.dumps(report.to_json(plan)) if args.json else report.to_text(plan), flush=True)


def _scaling(config: Config, targets: list, as_json: bool) -> None:
    from aether.plan import report
    from aether.plan.scaling import row, verdict, weak_scaling

    plans = weak_scaling(config, targets, lambda p: _progress(f"{p.topology}: {p.compile_seconds:.0f} s"))
    rows = [row(plan) for plan in plans]
    if as_json:
        print(json.dumps({"rows": rows, "verdict": verdict(rows)}), flush=True)
    else:
        print(f"{report.scaling_text(rows)}\n{verdict(rows)}", flush=True)


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _sized(config: Config, args: flags.FlagValues) -> Config:
    """Put --batch and --context into a config."""
    batch, context = args.batch or config.data.batch_size, args.context or config.data.context
    return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=batch, context=context))


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
