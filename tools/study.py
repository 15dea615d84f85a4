r"""Compare settings, each at its own best learning rate, and print the tables.

  python -m tools.study --config=configs/shakespeare_char.py --config.data.path=tinyshakespeare.txt --out=runs/study \
      --vary=model.kind=gpt2,aether --sweep=optim.learning_rate=1e-3,2e-3,3e-3,6e-3,1e-2,2e-2 --seeds=3 --jobs=2

First every value of --sweep, for every combination of the --vary values, with seed 0 and a part of the steps; then
each combination at its best value, with all steps and seeds 0, 1, 2 .... The final loss on the whole first validation
set decides, or with --score=error its share of wrong guesses. Every run is a `launch.train` in a folder of its own,
so the same command goes on after a kill.

--cases=FILE.toml lists settings to compare that are no grid: a table [NAME] for each, with lines such as
'model.epsilon' = 0.1; with --vary too, each of them with each of its values. To try many things on a small budget,
--rungs=3 makes the sweep three times, with a quarter, half and all of its steps, after each of which only the better
half of the values goes on (successive halving), and --finalists=N lets the better half of the combinations go on, and
the N best and the first get the whole runs.

On an accelerator --together=N makes up to N runs that differ in seed and learning rate alone one program, the training
step under jax.vmap: a small network leaves most of the device idle. Its runs have no folder of their own.

OUT/results.jsonl has a line for every run, OUT/logs what each said, OUT/sweep.png the losses over the swept key,
OUT/compute.png those of the whole runs over their floating-point operations.
"""

import sys
from pathlib import Path

from absl import flags

from aether.errors import AetherError, InputError
from launch import cli
from tools.study_plan import open_folder, plan, read_plan, read_results
from tools.study_runs import Runner, sole_user, stop_signals
from tools.study_tables import plot, plot_compute, report


def main(args: flags.FlagValues) -> None:
    """Run what is missing, draw the sweep, and print the tables."""
    out = Path(args.out)
    study = read_plan(out) if args.table_only else plan(args)
    results = read_results(out)
    if args.together > 1 and study.key not in ("", "optim.learning_rate"):
        raise InputError(f"--together is {args.together} with --sweep={study.key}; it takes optim.learning_rate alone.")
    if not args.table_only:
        with sole_user(out) as lock:
            open_folder(out, study)
            runner = Runner(study, out, args.jobs, lock, args.together)
            with stop_signals(runner):
                for rung in range(study.rungs):
                    ladder = study.ladder(runner.results)
                    runner(ladder[rung] if rung < len(ladder) else [])
                runner([job for c in study.combinations for job in study.full(c, runner.results)])
        results = runner.results
    if study.values:
        plot(study, results, out / "sweep.png")
    plot_compute(study, results, out / "compute.png")
    print(report(study, results))
    failed = [name for name in study.jobs(results) if results.get(name, {}).get("status") == "failed"]
    if failed and not args.table_only:
        raise AetherError(f"{len(failed)} runs failed, see {out / 'logs'}; the same command tries them again.")


def define() -> flags.FlagValues:
    """Return the flags."""
    values = cli.new_flags(config=True)
    flags.DEFINE_multi_string("vary", [], "KEY=VALUE,VALUE: settings to compare; given again: all combinations", values)
    flags.DEFINE_string("sweep", "", "KEY=NUMBER,NUMBER: each combination takes its best (empty: no sweep)", values)
    flags.DEFINE_float("sweep_fraction", 0.5, "share of the steps in the sweep", 1e-6, 1.0, values)
    flags.DEFINE_string("cases", "", "TOML file with a table of settings for each case to compare", values)
    flags.DEFINE_integer(
        "rungs", 1, "lengths of the sweep's runs, each twice the one before", 1, 10, flag_values=values
    )
    flags.DEFINE_integer("finalists", 0, "whole runs for so many combinations and the first (0: all)", 0, None, values)
    flags.DEFINE_enum("score", "loss", ["loss", "error"], "what decides, and is in the tables", values)
    flags.DEFINE_integer("seeds", 3, "seeds of the final runs", lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
        "jobs", 1, "runs at a time, the cores shared out among them", lower_bound=1, flag_values=values
    )
    flags.DEFINE_integer("together", 1, "runs that are one program", 1, 1000, flag_values=values)
    flags.DEFINE_string("out", "runs/study", "folder of the runs, results.jsonl and sweep.png", values)
    flags.DEFINE_bool("table_only", False, "print the tables of what is done in --out", values)
    return values


FLAGS = define()

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))
